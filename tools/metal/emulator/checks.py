"""The run-time checks, and which of them are on."""

from __future__ import annotations

from collections.abc import Mapping

CHECKS = (
    "bounds",
    "alignment",
    "constants",
    "uninitialised",
    "race",
    "divergence",
    "uniform",
    "lanes",
    "edge",
    "limits",
    "division",
    "steps",
)
"""Their names, in the order of the runtime's bits (`umfa_checks` in runtime/interface.h)."""


def chosen(checks: bool | Mapping[str, bool]) -> frozenset[str]:
    """The checks that are on, of ``Options.checks``."""
    if isinstance(checks, bool):
        return frozenset(CHECKS) if checks else frozenset()
    unknown = [name for name in checks if name not in CHECKS]
    if unknown:
        raise ValueError(f"no check is named {unknown[0]!r}; there are: {', '.join(CHECKS)}")
    wrong = [f"{name!r}: {on!r}" for name, on in checks.items() if not isinstance(on, bool)]
    if wrong:
        raise ValueError(f"a check is on or off by True or False; got {wrong[0]}")
    return frozenset(name for name in CHECKS if checks.get(name, True))


def bits(names: frozenset[str]) -> int:
    return sum(1 << i for i, name in enumerate(CHECKS) if name in names)
