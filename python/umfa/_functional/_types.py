"""Types of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

WindowSize: TypeAlias = tuple[int | None, int | None] | Sequence[int | None] | None
"""(left, right) in keys; -1 or None is unbounded."""
