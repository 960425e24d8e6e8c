"""The modules of `umfa.shim.xformers`."""

from __future__ import annotations

from typing import Any

from . import _xformers_attention, _xformers_bias
from ._modules import Shim

VERSION = "0.0.35"
"""The release of xformers whose interface the modules have."""


def unbind(x: Any, dim: int) -> tuple[Any, ...]:
    """torch's: the slices of `x` along `dim`."""
    found: tuple[Any, ...] = x.unbind(dim)
    return found


ATTENTION = {name: getattr(_xformers_attention, name) for name in _xformers_attention.__all__}
BIASES = {name: getattr(_xformers_bias, name) for name in _xformers_bias.__all__}
PUBLIC_BIASES = {name: kind for name, kind in BIASES.items() if not name.startswith("_")}

_shim = Shim(
    "umfa.shim.xformers",
    {
        "xformers": {"__doc__": "Attention by umfa.", "__version__": VERSION},
        "xformers.ops": {
            **ATTENTION,
            "AttentionBias": _xformers_bias.AttentionBias,
            "AttentionMask": _xformers_bias.AttentionBias,
            "LowerTriangularMask": _xformers_bias.LowerTriangularMask,
            "unbind": unbind,
        },
        "xformers.ops.fmha": {**ATTENTION, **PUBLIC_BIASES},
        "xformers.ops.fmha.attn_bias": BIASES,
    },
)


def install() -> Shim:
    return _shim.install()
