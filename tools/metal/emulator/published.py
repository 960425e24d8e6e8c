"""Forms of the language in MLX's Metal headers, as the wheel of mlx has them.

Apple's own compiler reads these every day, so most rows of ``forms.tsv`` point there. This prints
them as rows:

    python -m tools.metal.emulator.published
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from . import structure, toolchain
from .provenance import COLUMNS, Key, forms, raw_forms
from .words import FUNCTIONS

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


def forms_of(include: Path, paths: Iterable[Path]) -> dict[Key, str]:
    """(kind, form) to the first place that has it, as path:line below ``include``."""
    found: dict[Key, str] = {}
    for path in paths:
        flat = flattened(include, path)
        for f in (*forms(structure.read(flat), flat), *raw_forms(path.read_text(), str(path))):
            if f.token.file.startswith(str(include)):
                place = Path(f.token.file).relative_to(include)
                found.setdefault(f.key, f"{place}:{f.token.line}")
    return found


def main() -> None:
    include = folder()
    if include is None:
        raise SystemExit("mlx is not installed here")
    source = f"ml-explore/mlx v{importlib.metadata.version('mlx')}"
    print("\t".join(COLUMNS))
    for (kind, form), place in sorted(forms_of(include, headers(include)).items()):
        if kind == "function" and form.split("::")[-1].split("(")[0] not in FUNCTIONS:
            continue  # one of MLX's own, or an object that is called
        print("\t".join((kind, form, source, place)))


if __name__ == "__main__":
    main()
