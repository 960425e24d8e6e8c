"""How tests of two features together run on the emulated GPU."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from tests.metal import emulated

FAMILIES = (7, 9)  # bfloat as float, and fragments of bfloat


def check_emulated(check: Callable[..., None], pair: tuple[str, str]) -> None:
    """With a schedule, a GPU family and a size of GPU that the pair's names decide."""
    seed = zlib.crc32("-".join(pair).encode())
    emulated.settings.schedule_seed = seed | 1
    emulated.settings.cores = 1 if seed // 2 % 2 else 8  # 1: gets the tiles of large problems
    emulated.settings.family = FAMILIES[seed % 2]
    check(*pair, 100, "metal-emulated")
