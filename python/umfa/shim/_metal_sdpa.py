"""The modules of `umfa.shim.metal_sdpa_extension`, and what makes them SimpleTuner's."""

from __future__ import annotations

from collections.abc import Callable

from ..torch import _switch
from . import _dispatch_stats
from . import _metal_sdpa_functions as _functions
from ._modules import FOLDERS, Shim

EXTENSION = {
    "__doc__": "Attention by umfa, with the interface that SimpleTuner knows.",
    **{name: getattr(_functions, name) for name in _functions.__all__},
}
PACKAGE = {
    "__doc__": "What SimpleTuner asks before it imports metal_sdpa_extension.",
    "is_metal_sdpa_available": _functions.is_metal_available,
    "metal_sdpa_version": _functions.get_version,
}

_shims: dict[bool, Shim] = {
    children: Shim(
        "umfa.shim.metal_sdpa_extension",
        {"metal_sdpa_extension": EXTENSION, "pytorch_custom_op_ffi": PACKAGE},
        begin=lambda: begin(),
        folder=FOLDERS / "metal_sdpa_extension" if children else None,
    )
    for children in (False, True)
}


def install(children: bool) -> Shim:
    """The shim, installed. One that is installed with the other `children` is replaced."""
    _shims[not children].remove()
    return _shims[children].install()


def begin() -> Callable[[], None]:
    """Puts umfa under torch's attention; returns what undoes that. As with a block of
    `umfa.torch.sdpa`, umfa stays there if the program has enabled it, too."""
    _switch.enter()
    _dispatch_stats.listen()

    def end() -> None:
        _functions.clear_quantization_mode()
        _dispatch_stats.stop()
        _switch.leave()

    return end
