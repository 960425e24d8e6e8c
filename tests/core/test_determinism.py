"""Same bits every run, for every number of threads; and every instruction set is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import umfa
from tests import cases
from tests.cases import Case
from tests.checks import assert_same_bits
from umfa import _ext

if TYPE_CHECKING:
    from tests.attend import Attend

CAUSAL = ("causal", True)

CASES = [
    Case((2, 3, 129, 200, 64)),
    Case((1, 4, 300, 300, 80), "bfloat16", heads_k=2, options=(CAUSAL,)),
    Case((3, 2, 65, 1000, 33), "float16", options=(("window_size", (100, 20)),)),
    Case((1, 8, 1, 2000, 64), heads_k=2, alibi="heads"),  # decoding may split the keys
    Case((1, 1, 700, 700, 16), options=(("softcap", 8.0),)),  # one head: rows are the only split
]


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_again_and_with_any_number_of_threads(case: Case, attend_numpy: Attend) -> None:
    arrays, options = cases.inputs(case), cases.options(case)
    first = attend_numpy(*arrays, **options)
    for threads in (1, 2, 3, 8, 1):
        umfa.set_num_threads(threads)
        assert umfa.get_num_threads() == threads
        for _ in range(2):
            again = attend_numpy(*arrays, **options)
            for name, a, b in zip(("out", "lse"), again, first, strict=True):
                bits = f"u{a.dtype.itemsize}"
                assert_same_bits(a.view(bits), b.view(bits), f"{name}, {threads} threads")


# Into how many parts a GPU splits the keys of few queries depends on how many heads there are.
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.cpu_only) if c.shape[2] == 1 else c for c in CASES],
    ids=str,
)
def test_heads_and_batches_do_not_depend_on_company(case: Case, attend_numpy: Attend) -> None:
    """One head computed alone has the bits it has among others."""
    (query, key, value), options = cases.inputs(case), cases.options(case)
    slopes = options.pop("alibi_slopes", None)
    whole = attend_numpy(query, key, value, **options, alibi_slopes=slopes)
    batch, heads = query.shape[0], query.shape[2]
    b, h = batch - 1, heads - 1
    h_k = h // (heads // key.shape[2])
    if slopes is not None:
        options["alibi_slopes"] = slopes[h:]
    alone = attend_numpy(
        query[b:, :, h:], key[b:, :, h_k : h_k + 1], value[b:, :, h_k : h_k + 1], **options
    )
    bits = f"u{alone.out.dtype.itemsize}"
    assert_same_bits(alone.out.view(bits), whole.out[b:, :, h:].copy().view(bits))


# Read when the tests are collected, so that each instruction set gets tests of its own name.
ISAS = [
    pytest.param(
        name, marks=[] if usable else pytest.mark.skip(reason=f"no {name} on this machine")
    )
    for name, usable in _ext.cpu_isas()
]

COMPACT = [
    *(Case((2, 4, 67, 131, 72), dtype, heads_k=2) for dtype in ("float32", "float16", "bfloat16")),
    *(Case((1, 2, 50, 50, d), options=(CAUSAL,)) for d in (1, 3, 8, 17, 128, 257, 512)),
    *(Case((1, 2, 50, 50, d), "bfloat16", options=(CAUSAL,)) for d in (1, 3, 8, 17, 128, 257, 512)),
    *(Case((1, 2, 50, 50, d), "float16", options=(CAUSAL,)) for d in (1, 3, 8, 17, 128, 257, 512)),
    Case((1, 2, 40, 90, 64), head_dim_v=13, options=(("window_size", (7, 3)),)),
    Case((1, 4, 90, 40, 24), alibi="heads", options=(CAUSAL, ("softcap", 3.0))),
    Case((1, 1, 1, 777, 64), "float16", options=(CAUSAL,)),
    Case((1, 1, 300, 300, 64), "bfloat16"),
]


@pytest.mark.cpu_only
@pytest.mark.sanitize
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", COMPACT, ids=str)
def test_every_instruction_set_is_right(isa: str, case: Case, attend_numpy: Attend) -> None:
    _ext.set_cpu_isa(isa)
    assert _ext.cpu_isa() == isa
    attend_numpy.case(case)


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _ext.cpu_isa()
    with pytest.raises((ValueError, umfa.UnsupportedError), match="z80"):
        _ext.set_cpu_isa("z80")
    assert _ext.cpu_isa() == before
