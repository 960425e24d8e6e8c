"""Strides of arrays that MLX has not evaluated, in the parameters of kernels.

MLX tells the strides of an array to the kernels that read it, and to nobody before. A call is
planned with marks in their place. A kernel of its own then copies the parameters, and replaces each
mark by the stride that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

LARGEST = 2**20
"""Larger dimensions might make a mark of their own."""


@lru_cache(maxsize=1)
def _marks() -> list[int]:
    """8 p for primes p above 2^20: no stride of a contiguous array, whose factors are dimensions.

    They are less than 2^24, so that plans take rows of keys for near ones (near_rows of
    shaders/shared/constants.h). MLX's programs use no layout in which keys lie further
    apart: from one key to the next it would be 32 MB.
    """
    primes = (n for n in range(2**20 + 1, 2**21, 2) if all(n % d for d in range(3, 1450, 2)))
    return [8 * prime for prime in islice(primes, 64)]


@lru_cache(maxsize=1)
def _marks_of_bytes() -> list[int]:
    """16 p for primes p above 2^19: of bytes, 16 are read at once. None is 8 times a prime."""
    primes = (n for n in range(2**19 + 1, 2**20, 2) if all(n % d for d in range(3, 1025, 2)))
    return [16 * prime for prime in islice(primes, 64)]


def marks(number: int, shape: Sequence[int], element_bytes: int) -> tuple[int, ...]:
    """Strides for the plan of an array, of a call's arrays this one; none if it has to be
    contiguous."""
    found, largest = _marks(), LARGEST
    if element_bytes == 1:
        found, largest = _marks_of_bytes(), LARGEST // 2
    first = 3 * number
    if len(shape) not in (3, 4) or max(shape) >= largest or first + 3 > len(found):
        return ()
    return (*found[first : first + len(shape) - 1], 1)


def shown(array: Any) -> Any:
    """The array's bytes in rows whose neighbours are neighbours in memory. MLX copies an array if
    its rows are not, and no other."""
    return mx.view(array, mx.uint8)


def resolved(params: Any, data: bytes, tensors: Sequence[tuple[Any, tuple[int, ...]]]) -> Any:
    """The parameters of a launch with the strides of its arrays.

    Parameters
    ----------
    params, data
        The parameters with marks, as an array of 64-bit integers and as bytes.
    tensors
        The arrays that the launch reads, with the marks of each, or none.
    """
    arrays = [array for array, _ in tensors]
    shapes = tuple([array.shape for array in arrays])
    places = _places(data, tuple([own for _, own in tensors]), shapes)
    used = sorted({array for _, array, _ in places})
    if not used:
        return params
    numbers = {array: i for i, array in enumerate(used)}
    text = tuple((word, numbers[array], dimension) for word, array, dimension in places)
    sizes = tuple(arrays[i].dtype.size for i in used)
    [found] = _kernel(text, sizes)(
        inputs=[params, *(shown(arrays[i]) for i in used)],
        grid=(params.size, 1, 1),
        threadgroup=(params.size, 1, 1),
        output_shapes=[params.shape],
        output_dtypes=[mx.int64],
    )
    return found


@lru_cache(maxsize=256)
def _places(
    data: bytes, marks: tuple[tuple[int, ...], ...], shapes: tuple[tuple[int, ...], ...]
) -> list[tuple[int, int, int]]:
    """Where marks are in parameters: (64-bit word, number of the array, its dimension)."""
    words = np.frombuffer(data[: len(data) // 8 * 8], np.int64)
    found: list[tuple[int, int, int]] = []
    known: set[int] = set()
    for array, own in enumerate(marks):
        for dimension, mark in enumerate(own[:-1]):
            if mark in known:  # the same array is there twice
                continue
            at = np.flatnonzero(words == mark).tolist()
            assert at or shapes[array][dimension] == 1, "a stride is not where it is expected"
            found += [(word, array, dimension) for word in at]
            known.add(mark)
    return found


@lru_cache(maxsize=256)
def _kernel(places: tuple[tuple[int, int, int], ...], sizes: tuple[int, ...]) -> Any:
    """Copies parameters, and puts strides there: (word, input, its dimension). `sizes`: bytes of an
    element of each input."""
    lines = [
        "uint word = thread_position_in_grid.x;",
        "int64_t value = umfa_from[word];",
        *(
            f"if (word == {word}) value = umfa_in{i}_strides[{dimension}] / {sizes[i]};"
            for word, i, dimension in places
        ),
        "umfa_to[word] = value;",
    ]
    digest = hash((places, sizes)) & 0xFFFFFFFFFFFFFFFF  # of integers: the same in every process
    return mx.fast.metal_kernel(
        name=f"umfa_strides_{digest:016x}",
        input_names=["umfa_from", *(f"umfa_in{i}" for i in range(len(sizes)))],
        output_names=["umfa_to"],
        source="\n".join(lines) + "\n",
        ensure_row_contiguous=False,
    )
