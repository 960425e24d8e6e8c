"""Arrays that end where a page ends, nothing readable behind: kernels read only what is theirs."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest

from tests.array_libraries import Array
from tests.cases import normal
from tests.checks import assert_same_bits
from tests.gradients import Forward, wanted_of

HEAD_DIMS = (1, 2, 7, 15, 16, 17, 31, 33, 47)
"""Less than a vector, a little more, and more than one: with 8 lanes and with 16."""


class AtPageEnds:
    """Copies of arrays, each at the end of a page. A read behind one ends the process."""

    def __init__(self) -> None:
        self.pages: list[mmap.mmap] = []

    def copy(self, x: Array) -> Array:
        used = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, used + mmap.PAGESIZE)
        self.pages.append(pages)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert protect(start + used, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
        copy = np.frombuffer(pages, x.dtype, x.size, used - x.nbytes).reshape(x.shape)
        copy[:] = x
        return copy


def results(given: dict[str, Any], dout: Array) -> dict[str, Array]:
    forward = Forward(**given)
    gradients = forward.backward(dout, wanted=wanted_of(given))
    return {"out": forward.out, "lse": forward.lse, **gradients}


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seqlen_q", [1, 5, 21], ids="{}_queries".format)
def test_nothing_behind_an_array_is_read(isa: str, dtype: str, seqlen_q: int) -> None:
    for head_dim in HEAD_DIMS:
        rows = {"query": seqlen_q, "key": 19, "value": 19, "dout": seqlen_q}
        plain = {
            name: normal((1, count, 1, head_dim), dtype, seed=i)
            for i, (name, count) in enumerate(rows.items())
        }
        plain["attn_mask"] = normal((1, 1, seqlen_q, 19), seed=4)
        memory = AtPageEnds()
        placed = {name: memory.copy(x) for name, x in plain.items()}
        expected = results(plain, plain.pop("dout"))
        found = results(placed, placed.pop("dout"))
        for name, x in expected.items():
            assert_same_bits(found[name], x)
