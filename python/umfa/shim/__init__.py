"""umfa under other libraries' names, for programs that import these libraries.

>>> import umfa.shim
>>> shim = umfa.shim.flash_attn()  # `import flash_attn` finds umfa now
>>> shim.remove()

Importing this module changes nothing. Each function adds modules to ``sys.modules``, and refuses if
the library itself can be imported: umfa never takes its place.
"""

from __future__ import annotations

from ._modules import Shim

__all__ = ["Shim", "metal_sdpa_extension"]


def __dir__() -> list[str]:
    return __all__


def metal_sdpa_extension(*, children: bool = True) -> Shim:
    """Make ``metal_sdpa_extension`` and ``pytorch_custom_op_ffi`` importable, for SimpleTuner.

    umfa computes PyTorch's ``scaled_dot_product_attention`` from then on, as `umfa.torch.enable`
    describes: these modules do that when they are imported.

    Parameters
    ----------
    children : bool
        Let Python processes that this one starts import the modules, too: a folder with them is
        put in front of ``PYTHONPATH``. SimpleTuner checks the modules in such a process.

    Returns
    -------
    Shim
        `Shim.remove` undoes everything; so does the end of a ``with`` block.

    Raises
    ------
    umfa.UnsupportedError
        One of the modules can be imported already.
    """
    from . import _metal_sdpa

    return _metal_sdpa.install(children)
