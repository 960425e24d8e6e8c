"""A35: calls between a framework's own operations, from several threads, without synchronising."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries
from tests.cases import normal

SHAPES = [  # (seqlen, heads, head_dim); the first is A04
    (1536, 24, 128), (77, 12, 64), (300, 16, 72), (129, 4, 40), (512, 8, 128), (1, 32, 128),
]  # fmt: skip


@pytest.mark.slow
def test_a35_first_call_equals_later_calls() -> None:
    """torch writes the query just before each call and reads the result just after it."""
    torch = array_libraries.load("torch")
    bases = [
        [torch.tensor(normal((1, *shape), "bfloat16", seed=10 * i + j)) for j in range(3)]
        for i, shape in enumerate(SHAPES)
    ]

    def call(i: int) -> Any:
        base, key, value = bases[i]
        query = torch.module.empty_like(base)
        query.copy_(base).mul_(2).div_(2)  # exact: a query that is read too early differs
        return umfa.flash_attn_func(query, key, value, causal=i % 2 == 1).add(0)

    first = [torch.bits(call(i)) for i in range(len(SHAPES))]
    assert all(np.any(bits) for bits in first)

    def work(seed: int) -> None:
        order = list(range(len(SHAPES))) * 2
        random.Random(seed).shuffle(order)
        for i in order:
            assert np.array_equal(torch.bits(call(i)), first[i]), SHAPES[i]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
