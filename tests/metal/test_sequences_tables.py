"""Tables of sequences that a kernel reads in place of the host, on the emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.cases import normal
from tests.metal import emulated
from umfa import _ext

Array = np.ndarray[Any, np.dtype[Any]]

pytestmark = pytest.mark.usefixtures("own_settings")


def both(
    q: Array, k: Array, v: Array, options: dict[str, Any], tables: dict[str, Array]
) -> Iterator[tuple[Array, Array]]:
    """(out, lse) as the host's tables give them, and as the kernel's do."""
    for emulated.settings.by_tables in (False, True):
        yield emulated.call(q, k, v, options, **tables)


def check_same(*arguments: Any) -> None:
    known, found = both(*arguments)
    for a, b in zip(known, found, strict=True):
        assert np.array_equal(a, b)
    assert not emulated.table_fault.any()


def cache(batch: int, rows: int, head_dim: int = 64, heads: int = 2) -> tuple[Array, Array]:
    shape = (batch, rows, heads, head_dim)
    return normal(shape, "float16", seed=1), normal(shape, "float16", seed=2)


SPLITS: dict[str, dict[str, Any]] = {
    "umfa's": {},
    "three": {"num_splits": 3, "causal": True},
    "of a window": {"window_size": (100, 0), "num_splits": 2},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5, "window_size": (203, 0)},
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(
    "lengths", [[700, 3, 0, 256], *(pytest.param(x, marks=pytest.mark.slow) for x in (
        [700] * 4, [1, 1, 0, 0], [129, 5, 700, 699]))],
)  # fmt: skip
def test_splits_are_those_of_the_host(name: str, lengths: list[int]) -> None:
    """Bit for bit, because the kernel divides the keys by the same rule."""
    q = normal((4, 1, 4, 64), "float16", seed=0)
    check_same(q, *cache(4, 700), SPLITS[name], {"seqused_k": np.array(lengths, np.int32)})


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim", "rows"), [(2, 128, 1), (16, 64, 1), (4, 64, 8)])
def test_other_decode_kernels(heads: int, head_dim: int, rows: int) -> None:
    """The one for a single row, and those with more blocks of rows."""
    q = normal((3, rows, heads, head_dim), "float16", seed=0)
    tables = {"seqused_k": np.array([900, 300, 1], np.int64)}
    check_same(q, *cache(3, 900, head_dim), {"causal": True}, tables)


@pytest.mark.slow
def test_tiles_whose_keys_are_split() -> None:
    q = normal((3, 1, 4, 576), "float16", seed=0)
    k, v = normal((3, 900, 1, 576), "float16", seed=1), normal((3, 900, 1, 512), "float16", seed=2)
    check_same(q, k, v, {}, {"seqused_k": np.array([900, 300, 1], np.int64)})


def test_more_sequences_than_threads() -> None:
    """Sums go on from one chunk of the sequences to the next."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(0, 40, 700).astype(np.int32)
    q = normal((700, 1, 2, 64), "float16", seed=0)
    check_same(q, *cache(700, 40), {"num_splits": 2}, {"seqused_k": lengths})


def test_strided_tables() -> None:
    whole = np.zeros((5, 3, 2), np.int64)
    whole[:4, :, 0] = [[3, 1, 0], [2, -5, 7], [4, 5, 6], [6, 0, 1]]
    lengths = np.array([48, 40, 3, 9, 20], np.int32)[::-2]
    q = normal((3, 1, 4, 64), "float16", seed=0)
    tables = {
        "block_table": whole[::2, :, 0],
        "seqused_k": np.array([20, 3, 0], np.int32)[::-1],
        "cache_leftpad": np.zeros(6, np.int32)[::2],
    }
    assert lengths.strides == (-8,)
    check_same(q, *cache(8, 16), {}, tables)


def test_pages_that_are_no_power_of_two() -> None:
    q = normal((3, 12, 4, 64), "float16", seed=0)
    tables = {
        "block_table": np.array([[3, 1, 0, 99], [2, -5, 7, 7], [4, 5, 6, 99]], np.int32),
        "cu_seqlens_k": np.array([0, 60, 63, 135], np.int32),
    }
    check_same(q, *cache(8, 24), {"causal": True}, tables)


def test_no_key_is_promised() -> None:
    q = normal((2, 1, 2, 64), "float16", seed=0)
    tables = {"seqused_k": np.array([0, 0], np.int32)}
    check_same(q, *cache(2, 50), {"max_seqlen_k": 0}, tables)


def random_call(generator: np.random.Generator) -> tuple[Any, ...]:
    """A call whose tables may hold anything."""
    batch, total = int(generator.integers(1, 6)), int(generator.integers(0, 60))
    high = int(generator.choice([10, 60, 2**31 - 1]))
    dtype = generator.choice([np.int32, np.int64])

    def entries(*shape: int) -> Array:
        values = generator.integers(-2, high, shape)
        return (
            np.minimum(values, 70).astype(dtype)
            if generator.random() < 0.8
            else values.astype(dtype)
        )

    def offsets(rows: int) -> Array:
        values = np.concatenate([[0], np.sort(generator.integers(0, rows + 1, batch))])
        if generator.random() < 0.3:
            values[generator.integers(batch + 1)] += generator.integers(-20, 20)
        return values.astype(dtype)

    tables: dict[str, Array] = {}
    if generator.random() < 0.5:
        q = normal((total, 2, 64), "float16", seed=0)
        tables["cu_seqlens_q"] = offsets(total)
    else:
        q = normal((batch, int(generator.integers(1, 20)), 2, 64), "float16", seed=0)
    kind = generator.choice(["cache", "pages", "packed"])
    k, v = cache(batch, 50) if kind == "cache" else cache(6, 8)
    if kind == "packed":
        k, v = k.reshape(-1, 2, 64), v.reshape(-1, 2, 64)
        tables["cu_seqlens_k"] = offsets(len(k))
    if kind == "pages":
        tables["block_table"] = generator.integers(0, 6, (batch, 4)).astype(dtype)
        if generator.random() < 0.3:
            tables["block_table"][generator.integers(batch), generator.integers(4)] = high
    for name, chance in (
        ("seqused_k", 0.6), ("seqused_q", 0.2), ("cache_leftpad", 0.2), ("prefix_lens", 0.2),
        ("cache_batch_idx", 0.0 if kind == "packed" else 0.2),
    ):  # fmt: skip
        if generator.random() < chance:
            tables[name] = np.abs(entries(batch)) if generator.random() < 0.8 else entries(batch)
            if name == "cache_batch_idx" and generator.random() < 0.8:
                tables[name] %= batch
    options: dict[str, Any] = {"causal": bool(generator.random() < 0.5)}
    if kind != "packed" and "seqused_k" in tables and generator.random() < 0.5:
        rows = int(generator.integers(1, 12))
        tables["new_key"], tables["new_value"] = cache(batch, rows)
        if generator.random() < 0.7:
            tables["seqused_k"] %= 50 - 18 * (kind == "pages") - rows
    elif generator.random() < 0.3:
        options["max_seqlen_q"] = int(generator.integers(0, 60))
        options["max_seqlen_k"] = int(generator.integers(0, 60))
    return q, k, v, options, tables


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_the_gpu_notes_what_the_host_refuses(seed: int) -> None:
    """And nothing else; what is right has the host's bits, or rounds otherwise where the host gives
    few queries to another kernel. The emulator stops a kernel that leaves a tensor."""
    generator = np.random.default_rng(seed)
    refused = 0
    for _ in range(60):
        q, k, v, options, tables = random_call(generator)
        caches = [k.copy(), v.copy()]
        emulated.settings.by_tables = False
        known = None
        try:
            known = emulated.call(q, k, v, options, **tables)
        except ValueError:
            refused += 1
        emulated.settings.by_tables = True
        try:
            found = emulated.call(q, *caches, options, **tables)
        except ValueError:  # by what the host knows without the numbers
            assert known is None
            continue
        assert np.isfinite(found[0]).all()
        assert bool(emulated.table_fault[3]) == (known is None), (tables, emulated.table_fault)
        if known is not None:
            assert np.abs(found[0] - known[0]).max(initial=0) < 2e-3
            assert np.array_equal(caches, [k, v])
    assert 10 < refused < 50


def test_what_is_noted() -> None:
    """The first sequence's first fault, as the host would name it."""
    q, (k, v) = normal((3, 1, 2, 64), "float16", seed=0), cache(3, 50)
    emulated.settings.by_tables = True
    tables = {"seqused_k": np.array([50, 51, -7], np.int64)}
    emulated.call(q, k, v, **tables)
    got, low, high, table_and_row, _ = emulated.table_fault.tolist()
    table, row = table_and_row & 0xFFFFFFFF, table_and_row >> 32
    assert (got, low, high, row) == (51, 0, 50, 1)
    assert _ext.table_fields()[table - 1] == "seqused_k"


def test_a_sequence_that_appends_to_a_page_twice() -> None:
    """None of its rows is written, as no order of them would be right."""
    q, (k, v), new = normal((2, 1, 2, 64), "float16", seed=0), cache(4, 8), cache(2, 11)
    before = k.copy()
    emulated.settings.by_tables = True
    emulated.call(
        q, k, v, block_table=np.array([[0, 3, 3], [1, 1, 2]]), seqused_k=np.array([0, 0]),
        new_key=new[0], new_value=new[1],
    )  # fmt: skip
    got, _, _, _, _ = emulated.table_fault.tolist()
    assert got == 1
    assert np.array_equal(k[[1, 2]], before[[1, 2]])
    assert np.array_equal(k[0], new[0][0, :8])


def test_plain_kernels_read_no_tables() -> None:
    """Of calls whose tables the host reads, nothing changes: same launches, nothing more."""
    q, (k, v) = normal((3, 1, 2, 64), "float16", seed=0), cache(3, 50)
    emulated.call(q, k, v, seqused_k=np.array([50, 5, 7]))
    assert [x["kernel"].split("_")[0] for x in emulated.last_plan["launches"]] == ["decode"]
