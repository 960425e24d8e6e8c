"""MLX's Metal headers, as the wheel of mlx has them: Apple's compiler reads these every day."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from . import toolchain

# What MLX's .metal files include before others, and a macro that its newest headers define.
_HEAD = """\
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/steel/defines.h"
#define STEEL_PRAGMA_NO_UNROLL
"""


def folder() -> Path | None:
    """The include folder of the installed mlx, or None."""
    spec = importlib.util.find_spec("mlx")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "include"
        if (path / "mlx/backend/metal/kernels").is_dir():
            return path
    return None


def headers(include: Path) -> list[Path]:
    """Its kernels' headers, those of attention first; without those for Metal 4 alone."""
    found = (include / "mlx/backend/metal/kernels").rglob("*.h")
    kept = [p for p in found if "nax" not in p.name]
    return sorted(kept, key=lambda p: ("attn" not in p.parts, "sdpa" not in p.name, str(p)))


def flattened(include: Path, path: Path) -> str:
    """A header with what it includes, preprocessed."""
    text = f'{_HEAD}#include "{path}"\n'
    return toolchain.preprocess(text, "all.metal", "", [str(include)], {})
