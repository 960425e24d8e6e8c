"""Which combinations of parameters are slow; tests/conftest.py samples both kinds further."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*lists: Sequence[Any], mark: pytest.MarkDecorator = pytest.mark.slow) -> list[Any]:
    """Every combination of the values; all but a few get `mark`.

    The unmarked ones combine the n-th values of all lists; shorter lists repeat. So every value is
    in one of them. A list may hold a value twice, to combine it with two others. A value that is a
    list holds several parameters that belong together.

    Meant for kernels on the emulator: compiling each combination takes about a second of CPU time,
    or half a second where only function constants differ.
    Most values have their own code in a kernel, but few combinations do.
    """

    def flat(values: Sequence[Any]) -> list[Any]:
        return [x for v in values for x in (v if isinstance(v, list) else [v])]

    longest = max(map(len, lists))
    usual = [flat([values[n % len(values)] for values in lists]) for n in range(longest)]
    rest: list[list[Any]] = []
    for values in itertools.product(*lists):
        if flat(values) not in usual and flat(values) not in rest:
            rest.append(flat(values))
    return [*(pytest.param(*x) for x in usual), *(pytest.param(*x, marks=mark) for x in rest)]
