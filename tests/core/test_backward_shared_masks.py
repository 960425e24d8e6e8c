"""The gradient of a mask that several heads share, which their tasks add up in turns."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests.cases import normal
from tests.core.test_backward import check
from tests.core.test_backward_memory import MEASURE
from tests.gradients import OPERANDS, Forward, wanted_of
from tests.process_memory import STATUS
from tests.tiers import crossed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.array_libraries import Array
    from tests.conftest import RunPython

BATCH, QUERIES, KEYS = 2, 150, 700
MASKS = {
    "all": (QUERIES, KEYS),
    "heads": (BATCH, 1, QUERIES, KEYS),
    "batch": (1, 4, QUERIES, KEYS),
    "none": (BATCH, 4, QUERIES, KEYS),
    "queries": (BATCH, 1, 1, KEYS),
}
"""Masks by what shares an element of theirs."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 30)},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 5},
    "softcap": {"softcap": 10.0},
}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = umfa.get_num_threads()
    yield
    umfa.set_num_threads(before)


def tensors(
    mask: str, dtype: str = "float32", heads_k: int = 4, mask_dtype: str | None = None
) -> tuple[dict[str, Array], Array]:
    """Arguments of a call, and dout."""
    given = {
        "query": normal((BATCH, QUERIES, 4, 64), dtype, seed=1),
        "key": normal((BATCH, KEYS, heads_k, 64), dtype, seed=2),
        "value": normal((BATCH, KEYS, heads_k, 40), dtype, seed=3),
        "attn_mask": normal(MASKS[mask], mask_dtype or dtype, seed=4),
    }
    return given, normal((BATCH, QUERIES, 4, 40), dtype, seed=5)


@pytest.mark.parametrize(
    ("mask", "heads_k", "dtype", "threads"),
    crossed(list(MASKS), [4, 2, 1], ["float32", "bfloat16", "float16"], [1, 2, 3, 8]),
)
def test_values(mask: str, heads_k: int, dtype: str, threads: int) -> None:
    """With masks of the tensors' dtype, whose gradient is rounded once, after the sum."""
    umfa.set_num_threads(threads)
    given, dout = tensors(mask, dtype, heads_k)
    check(given, dout)


@pytest.mark.parametrize(
    ("option", "mask", "heads_k", "dtype"),
    crossed(list(OPTIONS), ["all", "heads", "batch"], [4, 2], ["float32", "bfloat16"]),
)
def test_bits(option: str, mask: str, heads_k: int, dtype: str) -> None:
    """They depend neither on the number of threads nor on which gradients are wanted."""
    given, dout = tensors(mask, dtype, heads_k, "float32")
    call = Forward(**given, **OPTIONS[option])
    umfa.set_num_threads(1)
    alone = call.backward(dout, wanted=OPERANDS) | call.backward(dout, wanted=("dmask",))
    for threads in (1, 2, 3, 8):
        umfa.set_num_threads(threads)
        for wanted in (wanted_of(given), ("dq", "dmask"), ("dk", "dmask"), ("dv", "dmask")):
            for name, gradient in call.backward(dout, wanted=wanted).items():
                assert gradient.tobytes() == alone[name].tobytes(), f"{name}, {threads} threads"


def test_sequences_of_other_lengths() -> None:
    """One without queries, one without keys, and one as long as the mask."""
    starts_q, starts_k = (np.array(x, np.int32) for x in ([0, 0, 70, 220], [0, 90, 90, 790]))
    given = {
        "query": normal((220, 2, 64), seed=1),
        "key": normal((790, 2, 64), seed=2),
        "value": normal((790, 2, 64), seed=3),
        "attn_mask": normal((150, 700), seed=4),
    }
    call = Forward(**given, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    dout = normal(call.out.shape, seed=5)
    umfa.set_num_threads(3)
    found = call.backward(dout, wanted=wanted_of(given))
    # The others see nothing: the last sequence by itself has the same gradients.
    one = {"query": given["query"][70:], "key": given["key"][90:], "value": given["value"][90:]}
    last = Forward(**{name: x[None] for name, x in one.items()}, attn_mask=given["attn_mask"])
    expected = last.backward(dout[None, 70:], wanted=wanted_of(given))
    assert found["dmask"].tobytes() == expected["dmask"].tobytes()
    for name, first in (("dq", 70), ("dk", 90), ("dv", 90)):
        assert not found[name][:first].any(), name
        assert found[name][first:].tobytes() == expected[name].tobytes(), name


def test_calls_at_the_same_time() -> None:
    """Tasks of one call wait for each other while other calls have threads of the pool."""
    umfa.set_num_threads(3)
    given, dout = tensors("all")
    call = Forward(**given)
    alone = call.backward(dout, wanted=wanted_of(given))

    def again(_: int) -> dict[str, Array]:
        return Forward(**given).backward(dout, wanted=wanted_of(given))

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(again, range(12)):
            for name, gradient in found.items():
                assert gradient.tobytes() == alone[name].tobytes(), name


PEAK = """
umfa.set_num_threads(2)
seqlen, heads, head_dim = 4096, 4, 64
given = {
    name: normal((1, seqlen, heads, head_dim), seed=seed)
    for seed, name in enumerate(("query", "key", "value"))
}
given["attn_mask"] = normal((seqlen, seqlen), seed=4)
small = {name: x[:, :64] for name, x in given.items() if x.ndim == 4}
Forward(**small).backward(normal((1, 64, heads, head_dim), seed=5))  # starts the threads
call = Forward(**given)
measure(call, normal(call.out.shape, seed=5), given)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak(run_python: RunPython) -> None:
    """Beside its results, less than half of what float32 sums of all pairs would take."""
    root = str(Path(__file__).parents[2])
    process = run_python(STATUS + MEASURE + PEAK, root, timeout=600)
    assert process.returncode == 0, process.stderr
    peak, tensors_of_call = map(int, process.stdout.split())
    assert peak - tensors_of_call < 4096**2 * 4 / 2
