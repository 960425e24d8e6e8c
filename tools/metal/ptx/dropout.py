"""What dropout drops, as shaders/shared/philox.h has it, in NumPy or CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def philox(counter: Sequence[Any], key: tuple[int, int], xp: Any = np) -> list[Any]:
    """Philox-4x32-10 (Salmon et al. 2011) of arrays of counters: four words each."""
    c, (low, high), mask = [xp.asarray(x, np.uint64) for x in counter], key, np.uint64(2**32 - 1)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [high_b ^ c[1] ^ np.uint64(low), b & mask, high_a ^ c[3] ^ np.uint64(high), a & mask]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return c


def stays(
    p: float, seed: int, offset: int, batch: int, head: int, rows: Any, seqlen_k: int, xp: Any = np
) -> Any:
    """Which probabilities (rows, seqlen_k) of one head are kept. `rows`: indices of queries."""
    mixed = philox([offset % 2**32, offset >> 32, 0, 0], (seed % 2**32, seed >> 32))
    keys = xp.arange(seqlen_k)[None, :]
    # Of 16 keys, 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 share an evaluation.
    fours, place = keys // 16 * 4 + keys % 8 // 2, keys % 2 + keys % 16 // 8 * 2
    i = xp.asarray(rows)[:, None] + 0 * keys
    counter = [fours + 0 * i, i, xp.full_like(i, head), xp.full_like(i, batch)]
    words = philox(counter, (int(mixed[0]), int(mixed[1])), xp)
    firsts = xp.where(place == 0, words[0], words[1])
    of_keys = xp.where(place < 2, firsts, xp.where(place == 2, words[2], words[3]))
    return of_keys >= np.uint64(min(p * 2.0**32, 2.0**32 - 1))
