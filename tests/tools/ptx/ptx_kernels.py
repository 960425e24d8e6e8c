"""What the planner may ask of a GPU, as distinct kernels."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.metal.ptx.bundle import _identity, compile_launch
from tools.metal.ptx.cases import Case
from tools.metal.ptx.planner import plan
from tools.metal.ptx.translate import Ptx

Launch = dict[str, Any]


def launches_of(cases: Iterable[Case]) -> list[Launch]:
    """Every distinct kernel that the cases launch, by name."""
    found = {_identity(x): x for case in cases for x in plan(case)["launches"]}
    return sorted(found.values(), key=lambda x: str(x["kernel"]))


def compile_all(launches: list[Launch]) -> list[Ptx]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_launch, launches))
