"""Dropout in the forward and decode kernels: which probabilities go, what becomes of the rest."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests import philox, reference
from tests.cases import normal
from tests.checks import BASE, LSE, Tolerance, assert_close, assert_same_bits
from tests.metal import emulated
from tests.metal.emulated import MACHINES, SOME_MACHINES
from tests.sequences import offsets
from tests.tiers import crossed
from tools.metal.ptx import dropout

Array = np.ndarray[Any, np.dtype[Any]]
pytestmark = pytest.mark.usefixtures("own_settings")

FEW, MANY = (3, 700), (70, 130)
KINDS = pytest.mark.parametrize("lengths", [MANY, FEW], ids=["tiles", "decode"])


def test_the_generator_is_philox() -> None:
    """Known answers of Random123."""
    for counter, key, expected in (
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        assert " ".join(f"{int(word):08x}" for word in dropout.philox(counter, key)) == expected


def test_the_gpu_tools_drop_the_same() -> None:
    """The GPU tools have their own generator, because they run without the tests."""
    call = {"p": 0.3, "seed": 2**40 + 3, "offset": 2**33 + 1}
    for batch, head in ((0, 0), (3, 5)):
        rows = np.arange(70)
        gone = philox.dropped(**call, batch=batch, head=head, rows=rows, seqlen_k=131)
        kept = dropout.stays(*call.values(), batch, head, rows, 131)
        assert_same_bits(kept, ~gone)


def tolerance(dtype: str, p: float) -> Tolerance:
    """What is kept weighs more, and so does its rounding."""
    return Tolerance(*(x / (1 - p) for x in BASE[dtype]))


def dense(
    lengths: tuple[int, int], dtype: str = "float16", head_dim: int = 64, batch: int = 2
) -> tuple[Array, Array, Array]:
    return (
        normal((batch, lengths[0], 4, head_dim), dtype, seed=0),
        *(normal((batch, lengths[1], 2, head_dim), dtype, seed=i) for i in (1, 2)),
    )


def check(
    tensors: tuple[Array, Array, Array], p: float = 0.3, seed: int = 11, offset: int = 5,
    causal: bool = False, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, **more: Any,
) -> tuple[Array, Array]:  # fmt: skip
    shared = {"causal": causal, "softcap": softcap}
    found = emulated.call(
        *tensors,
        {
            **shared, "window_size": window,
            "dropout_p": p, "dropout_seed": seed, "dropout_offset": offset,
        },
        **more,
    )  # fmt: skip
    exact = reference.attention(
        *tensors, dropout_p=p, dropout_seed=seed, dropout_offset=offset, window_size=window,
        **shared, **more,
    )  # fmt: skip
    assert_close(found[0].astype(np.float64), exact[0], tolerance(tensors[0].dtype.name, p))
    assert_close(found[1].astype(np.float64), exact[1], LSE, "lse")
    return found


@pytest.mark.parametrize(
    ("p", "dtype"), crossed([0.1, 0.5, 0.9], ["float32", "float16", "bfloat16"])
)
@KINDS
def test_probabilities(lengths: tuple[int, int], p: float, dtype: str) -> None:
    check(dense(lengths, dtype), p)


@pytest.mark.parametrize("machine", [None, *SOME_MACHINES])
@KINDS
def test_any_machine(lengths: tuple[int, int], machine: str | None) -> None:
    emulated.settings.family = 9
    if machine:
        emulated.settings.options = MACHINES[machine]
    check(dense(lengths), seed=2**40 + 3, offset=2**33 + 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (37, 5)},
    "softcap": {"softcap": 5.0},
    "mask": {},
    "sink": {"learnable_sink": np.array([0.5, -2, 4, -np.inf], np.float32)},
}


@pytest.mark.parametrize(("name", "lengths"), crossed(list(OPTIONS), [MANY, FEW]), ids=str)
def test_options(name: str, lengths: tuple[int, int]) -> None:
    """A window whose first key is no multiple of four among them."""
    options = dict(OPTIONS[name])
    tensors = dense(lengths)
    if name == "mask":
        rng = np.random.default_rng(5)
        mask = rng.random((2, 4, *lengths)) < 0.6
        given = {"dropout_p": 0.4, "dropout_seed": 1}
        found = emulated.call(*tensors, given, attn_mask=mask)
        exact = reference.attention(*tensors, mask=mask, **given)
        assert_close(found[0].astype(np.float64), exact[0], tolerance("float16", 0.4))
        assert_close(found[1].astype(np.float64), exact[1], LSE, "lse")
    else:
        check(tensors, **options)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        ("float16", 40),
        ("float32", 192),
        *(
            pytest.param(dtype, head_dim, marks=pytest.mark.slow)
            for dtype in ("float16", "float32")
            for head_dim in (40, 160, 192, 300)
            if (dtype, head_dim) not in (("float16", 40), ("float32", 192))
        ),
    ],
)
def test_every_shape_of_tile(dtype: str, head_dim: int) -> None:
    check(dense((20, 45), dtype, head_dim, batch=1))


@pytest.mark.parametrize("seed", [1, 2])
@KINDS
def test_any_schedule(lengths: tuple[int, int], seed: int) -> None:
    emulated.settings.schedule_seed = seed
    check(dense(lengths))


def test_splits_do_not_matter() -> None:
    """The same ones are dropped, however the keys are cut: also where a window begins anywhere."""
    query, key, value = dense((2, 900), "float32")
    given = {"dropout_p": 0.5, "dropout_seed": 3, "window_size": (701, -1)}
    found = []
    for splits in (1, 2, 5):
        out, _ = emulated.call(query, key, value, {**given, "num_splits": splits})
        found.append(out)
        assert len(emulated.last_plan["launches"]) == (1 if splits == 1 else 2)
    exact = reference.attention(query, key, value, **given)
    for out in found:
        assert_close(out.astype(np.float64), exact[0], tolerance("float32", 0.5))


@pytest.mark.parametrize("window", [-1, 13])
@pytest.mark.parametrize("lengths", [([10, 0, 70], [40, 20, 65]), ([1, 8, 2], [400, 20, 333])])
def test_sequences(lengths: tuple[list[int], list[int]], window: int) -> None:
    """Indices count in each sequence; its number stands for the batch."""
    cu_q, cu_k = (offsets(n) for n in lengths)
    q = normal((int(cu_q[-1]), 4, 64), "float16", seed=0)
    k, v = (normal((int(cu_k[-1]), 2, 64), "float16", seed=i) for i in (1, 2))
    options = {"dropout_p": 0.3, "dropout_seed": 8, "window_size": (window, -1)}
    out, lse = emulated.call(q, k, v, options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b in range(3):
        rows, own = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        exact = reference.attention(
            q[None, rows], k[None, own], v[None, own], first_index=b, **options
        )
        assert_close(out[None, rows].astype(np.float64), exact[0], tolerance("float16", 0.3))
        assert_close(lse[None, :, rows].astype(np.float64), exact[1], LSE, "lse")


def test_the_key_of_a_call_is_seed_and_offset() -> None:
    tensors = dense((20, 40))
    found = {}
    for seed, offset in itertools.product((0, 1, 2**32), (0, 1, 2**32)):
        given = {"dropout_p": 0.5, "dropout_seed": seed, "dropout_offset": offset}
        found[seed, offset] = emulated.call(*tensors, given)[0].tobytes()
    assert len(set(found.values())) == 9


def test_without_dropout_nothing_changes() -> None:
    tensors = dense((20, 40))
    plain, given = emulated.call(*tensors), emulated.call(*tensors, {"dropout_seed": 9})
    assert_same_bits(plain[0].view(np.uint16), given[0].view(np.uint16))
