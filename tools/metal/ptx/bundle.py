"""Plans cases, compiles what they launch, and writes a folder that runs without umfa or clang.

The folder holds ``cases.json`` and the kernels: PTX, and machine code beside it where ptxas exists,
so that the other machine need not compile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .cases import Case
from .planner import plan
from .ptxas import assemble, find_ptxas
from .translate import Ptx, compile

SHADERS = Path(__file__).resolve().parents[3] / "shaders"


def compile_launch(launch: dict[str, Any], shaders: Path = SHADERS) -> Ptx:
    """The kernel of one launch of a plan, for exactly its threadgroup."""
    return compile(
        kernel_text(launch, shaders),
        include_dirs=[shaders],
        constants=launch["constants"],
        threads=launch["threadgroup"],
    )


def kernel_text(launch: dict[str, Any], shaders: Path) -> str:
    """What Metal would compile for a launch, with its #includes still to be followed."""
    source = shaders / launch["source"]
    return f'{launch["defines"]}#line 1 "{source}"\n{source.read_text()}'


def build(
    folder: Path, checks: Iterable[Case], timings: Iterable[Case], workers: int = 2
) -> dict[str, Any]:
    """Writes the bundle and returns what stands in its ``cases.json``."""
    kernels = folder / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    jobs = [(case, purpose) for purpose, cases in (("check", checks), ("time", timings))
            for case in cases]  # fmt: skip
    plans = [plan(case) for case, _ in jobs]
    launches = {_identity(x): x for p in plans for x in p["launches"]}
    with ThreadPoolExecutor(workers) as pool:
        written = dict(
            zip(
                launches,
                pool.map(lambda item: _write(kernels, *item), launches.items()),
                strict=True,
            )
        )
    described = {
        "cases": [
            {
                "name": case.name,
                "purpose": purpose,
                "case": case.plain(),
                "tensors": [name for name, _ in planned["tensors"]],
                "scratch_bytes": planned["scratch_bytes"],
                "data": [piece.hex() for piece in planned["data"]],
                "launches": [
                    {
                        **written[_identity(x)],
                        "bindings": x["buffers"],
                        "params": x["params"].hex(),
                        "params_index": x["params_index"],
                        "grid": x["grid"],
                        "threadgroup": x["threadgroup"],
                    }
                    for x in planned["launches"]
                ],
            }
            for (case, purpose), planned in zip(jobs, plans, strict=True)
        ]
    }
    (folder / "cases.json").write_text(json.dumps(described, indent=1))
    return described


def _identity(launch: dict[str, Any]) -> str:
    parts = [launch[k] for k in ("source", "defines", "constants", "threadgroup")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _write(folder: Path, identity: str, launch: dict[str, Any]) -> dict[str, Any]:
    ptx = compile_launch(launch)
    entry = ptx.kernels[launch["kernel"]]
    file = folder / f"{entry.symbol}-{identity}.ptx"
    file.write_text(ptx.text)
    found: dict[str, Any] = {
        "ptx": f"kernels/{file.name}",
        "symbol": entry.symbol,
        "buffers": list(entry.buffers),
    }
    if find_ptxas():
        assemble(ptx, file.with_suffix(".cubin"), "sm_90")
        found["cubin"] = f"kernels/{file.stem}.cubin"
    return found
