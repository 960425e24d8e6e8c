"""Which probabilities dropout leaves out: Philox-4x32-10 (Salmon et al. 2011) in NumPy.

Nothing here uses umfa.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = tuple[NDArray[np.uint64], ...]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> Words:
    """Four words of 32 bits for each counter; the parts of the counter broadcast."""
    a, b, c, d = (np.asarray(x).astype(np.uint64) for x in counter)
    for i in range(10):
        low, high = (np.uint64((k + i * step) % 2**32) for k, step in zip(key, _STEPS, strict=True))
        p, q = a * _FACTORS[0], c * _FACTORS[1]  # of 32-bit words: no overflow
        a, b = (q >> _SHIFT) ^ b ^ low, q & _LOW
        c, d = (p >> _SHIFT) ^ d ^ high, p & _LOW
    return tuple(np.broadcast_arrays(a, b, c, d))


def call_key(seed: int, offset: int) -> tuple[int, int]:
    """The key of one call: the seed's own words, mixed with the offset's."""
    words = philox((offset % 2**32, offset >> 32, 0, 0), (seed % 2**32, seed >> 32))
    return int(words[0]), int(words[1])


def dropped(
    p: float, seed: int, offset: int, *, batch: int, head: int, rows: Any, seqlen_k: int
) -> NDArray[np.bool_]:
    """True where the probability of a query and a key is left out.

    Parameters
    ----------
    batch, head : int
        The query's, as the call counts them: sequences, or all batch dimensions as one.
    rows : int array (rows,)
        The queries, counted inside the sequence.

    Returns
    -------
    bool array (rows, seqlen_k)
    """
    keys = np.arange(seqlen_k)
    # Of 16 keys, 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 share an evaluation.
    fours, places = keys // 16 * 4 + keys % 8 // 2, keys % 2 + keys % 16 // 8 * 2
    words = philox((fours[None, :], np.asarray(rows)[:, None], head, batch), call_key(seed, offset))
    each = np.choose(places, words)
    return each < np.uint64(min(int(p * 2**32), 2**32 - 1))
