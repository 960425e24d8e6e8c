"""Which combinations of parameters are tested in every run, and which with ``-m slow`` alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*lists: Sequence[Any], mark: pytest.MarkDecorator = pytest.mark.slow) -> list[Any]:
    """Every combination of the values, of which all but a few get `mark`.

    Those of every run are the first values of all lists, the second ones and so on, where a shorter
    list starts over: each value is among them. A value may stand in its list twice, to meet two
    others. A list inside is parameters that belong together.

    For kernels on the emulator: each combination is compiled, in about a second of CPU time, and
    each value has code of its own where combinations have little.
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
