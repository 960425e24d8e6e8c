"""Tables of sequences, new rows and rotary angles that cannot be right.

Each call is wrong in one place. It must raise the promised error, in the form
``[umfa.function] what; got …; expected …`` with the offending value in the text; `can_run` must
give the same reason; and no input, the caches above all, may have changed by a byte.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import umfa
import umfa.fa3
from tests import array_libraries
from tests.array_libraries import Framework
from tests.cases import normal
from tests.sequences import offsets, rotary_tables

VARLEN, KVCACHE = "flash_attn_varlen_func", "flash_attn_with_kvcache"
FA3 = "fa3.flash_attn_with_kvcache"
HEADS, HEADS_K, HEAD_DIM = 4, 2, 8


def varlen_arguments() -> dict[str, Any]:
    return {
        "q": normal((22, HEADS, HEAD_DIM), seed=1),
        "k": normal((27, HEADS_K, HEAD_DIM), seed=2),
        "v": normal((27, HEADS_K, HEAD_DIM), seed=3),
        "cu_seqlens_q": offsets([8, 0, 12]),
        "cu_seqlens_k": offsets([10, 0, 15]),
        "max_seqlen_q": 12,
        "max_seqlen_k": 15,
    }


def append_arguments() -> dict[str, Any]:
    cos, sin = rotary_tables(10, HEAD_DIM)
    return {
        "q": normal((3, 2, HEADS, HEAD_DIM), seed=1),
        "k_cache": normal((4, 10, HEADS_K, HEAD_DIM), seed=2),
        "v_cache": normal((4, 10, HEADS_K, HEAD_DIM), seed=3),
        "k": normal((3, 2, HEADS_K, HEAD_DIM), seed=4),
        "v": normal((3, 2, HEADS_K, HEAD_DIM), seed=5),
        "rotary_cos": cos,
        "rotary_sin": sin,
        "causal": True,
        "cache_seqlens": np.array([0, 8, 3], np.int32),
        "cache_batch_idx": np.array([3, 0, 1], np.int32),
        "cache_leftpad": np.array([0, 5, 3], np.int32),
    }


def paged_arguments() -> dict[str, Any]:
    arguments = append_arguments()
    del arguments["cache_batch_idx"], arguments["cache_leftpad"]
    return arguments | {
        "k_cache": normal((7, 5, HEADS_K, HEAD_DIM), seed=2),
        "v_cache": normal((7, 5, HEADS_K, HEAD_DIM), seed=3),
        "block_table": np.array([[0, -1], [6, 2], [3, 99]], np.int32),
    }


def paged_varlen_arguments() -> dict[str, Any]:
    paged = paged_arguments()
    return varlen_arguments() | {
        "k": paged["k_cache"],
        "v": paged["v_cache"],
        "block_table": np.array([[0, 1, 2], [-1, -1, -1], [6, 5, 4]], np.int64),
    }


def fa3_arguments() -> dict[str, Any]:
    """Packed queries and new rows, in pages of which the first ones are not read."""
    paged = paged_arguments()
    return {name: paged[name] for name in ("k_cache", "v_cache", "causal")} | {
        "q": normal((7, HEADS, HEAD_DIM), seed=1),
        "k": normal((9, HEADS_K, HEAD_DIM), seed=4),
        "v": normal((9, HEADS_K, HEAD_DIM), seed=5),
        "rotary_cos": paged["rotary_cos"],
        "rotary_sin": paged["rotary_sin"],
        "cu_seqlens_q": i32(1, 3, 3, 7),
        "cu_seqlens_k_new": i32(2, 3, 3, 8),
        "rotary_seqlens": i32(4, 10, 1),
        "cache_seqlens": i32(8, 2, 0),
        "cache_leftpad": i32(6, 0, 0),
        "cache_batch_idx": i32(3, 0, 1),
        "page_table": i32(*[[0, -1], [6, 2], [3, 99], [-1, 4]]),
    }


GOOD: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "varlen": (VARLEN, varlen_arguments),
    "append": (KVCACHE, append_arguments),
    "paged": (KVCACHE, paged_arguments),
    "paged varlen": (VARLEN, paged_varlen_arguments),
    "fa3": (FA3, fa3_arguments),
}


class Bad(NamedTuple):
    """One bad call: a good one of GOOD, with arguments replaced (None removes)."""

    good: str
    change: dict[str, Any]
    error: type[Exception]
    offending: str
    """Must be in the message."""

    what: str
    """So must this."""

    def __str__(self) -> str:
        names = "+".join(self.change)
        return f"{self.good}-{names}-{self.what}-{self.offending}"

    def arguments(self, framework: Framework) -> dict[str, Any]:
        given = GOOD[self.good][1]() | self.change
        removed = [name for name, x in self.change.items() if x is None]
        for name in removed:
            del given[name]
        return {
            name: framework.tensor(x) if isinstance(x, np.ndarray) else x
            for name, x in given.items()
        }


def i32(*values: Any) -> Any:
    return np.array(values, np.int32)


def offset_cases() -> Iterator[Bad]:
    for side, total in (("q", 22), ("k", 27)):
        name = f"cu_seqlens_{side}"
        for values, text, what in (
            (i32(0, 8, 7, 20), f"{name}[2] = 7 after 8", f"{name} is not monotone"),
            (i32(0, 8, 8, total + 1), str(total + 1), f"{name}[3] is past the end"),
            (i32(0, 8, 8, 2**31 - 1), str(2**31 - 1), f"{name}[3] is past the end"),
            (i32(-1, 8, 8, 20), "got -1", f"{name}[0] is negative"),
            (i32(9, 8, 8, 20), f"{name}[1] = 8 after 9", f"{name} is not monotone"),
            (i32(0, -8, 8, 20), "= -8 after 0", f"{name} is not monotone"),
        ):
            for dtype in (np.int32, np.int64):
                yield Bad("varlen", {name: values.astype(dtype)}, ValueError, text, what)
        far = np.array([0, 8, 8, 2**40])
        yield Bad("varlen", {name: far}, ValueError, str(2**40), f"{name}[3] is past the end")
        for table in (np.zeros((4, 1), np.int32), np.array(0, np.int32)):
            yield Bad("varlen", {name: table}, ValueError, str(table.shape), "has the wrong shape")
    shape = {"cu_seqlens_k": i32(0, 5, 9)}
    yield Bad("varlen", shape, ValueError, "(3,)", "cu_seqlens_k has the wrong shape")
    empty = {"cu_seqlens_q": i32(), "cu_seqlens_k": i32()}
    yield Bad("varlen", empty, ValueError, "(0,)", "cu_seqlens_q is empty")
    yield Bad("varlen", {"cu_seqlens_q": ()}, ValueError, "(0,)", "cu_seqlens_q is empty")
    yield Bad("varlen", {"cu_seqlens_k": [0, 8]}, ValueError, "(2,)", "has the wrong shape")
    yield Bad("varlen", {"cu_seqlens_k": {0, 8}}, TypeError, "builtins.set", "is not a tensor")
    for side, length in (("q", 12), ("k", 15)):
        name = f"max_seqlen_{side}"
        for value in (0, -1, length - 1):
            yield Bad("varlen", {name: value}, ValueError, f"got {value}", f"{name} is too small")
        for value in (12.5, "12", True, [12]):
            yield Bad("varlen", {name: value}, TypeError, repr(value), f"{name} is not an integer")
        yield Bad("varlen", {name: 2**63}, ValueError, str(2**63), "does not fit 64 bits")
        fraction = np.array(12.5, np.float32)
        yield Bad("varlen", {name: fraction}, TypeError, "12.5", f"{name} is not an integer")
    for dims in ((1, 22, HEADS, HEAD_DIM), (22, HEADS * HEAD_DIM)):
        q = normal(dims, seed=1)
        yield Bad("varlen", {"q": q}, ValueError, str(dims), f"q has {len(dims)} dimensions")
    slopes = normal((2, HEADS), seed=1)
    yield Bad("varlen", {"alibi_slopes": slopes}, ValueError, "(2, 4)", "has the wrong shape")


def length_cases() -> Iterator[Bad]:
    """Numbers for each sequence."""
    limits = {
        ("varlen", "seqused_q"): (8, 0, 12),
        ("varlen", "seqused_k"): (10, 0, 15),
        ("append", "cache_seqlens"): (10, 10, 10),
        ("append", "cache_batch_idx"): (3, 3, 3),
        ("append", "cache_leftpad"): (2, 10, 5),
        ("paged", "cache_seqlens"): (10, 10, 10),
    }
    for (good, name), most in limits.items():
        for b, value in ((0, -1), (1, most[1] + 1), (2, most[2] + 1), (0, 2**31 - 1)):
            table = i32(0, 0, 0)
            table[b] = value
            change = {name: table}
            yield Bad(good, change, ValueError, str(value), f"{name}[{b}] is out of range")
        tables = [i32(0), i32(0, 0, 0, 0), np.zeros((3, 1), np.int32)]
        if name != "cache_seqlens":  # one number is the length of all
            tables.append(np.array(1, np.int32))
        for table in tables:
            shape = str(table.shape)
            yield Bad(good, {name: table}, ValueError, shape, f"{name} has the wrong shape")
    for value in (-1, 11):
        what = "cache_seqlens[0] is out of range"
        yield Bad("append", {"cache_seqlens": value}, ValueError, str(value), what)
    yield Bad("append", {"cache_seqlens": 2**64}, ValueError, str(2**64), "does not fit 64 bits")
    yield Bad("append", {"cache_seqlens": [1, 2]}, ValueError, "(2,)", "has the wrong shape")
    for value in (1.5, "3", True, {1, 2, 3}):
        what = "cache_seqlens is not an integer"
        yield Bad("append", {"cache_seqlens": value}, TypeError, repr(value), what)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        yield from dtype_cases("varlen", name, [0, 0, 0, 0] if name[0] == "c" else [0, 0, 0])
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        yield from dtype_cases("append", name, [0, 1, 2])
    yield from dtype_cases("paged", "block_table", [[0, 1], [2, 3], [4, 5]])


def dtype_cases(good: str, name: str, values: list[Any]) -> Iterator[Bad]:
    for dtype in ("float32", "float16", "int16", "int8", "uint8", "bool"):
        table = np.array(values).astype(dtype)
        yield Bad(good, {name: table}, TypeError, dtype, f"{name} has the wrong dtype")


def overflow_cases() -> Iterator[Bad]:
    for good, used in (("append", i32(0, 9, 3)), ("paged", i32(0, 9, 3))):
        yield Bad(
            good, {"cache_seqlens": used}, ValueError, "9 rows in use and 2 new ones",
            "k_cache overflows for sequence 1",
        )  # fmt: skip
        yield Bad(
            good, {"cache_seqlens": None}, ValueError, "10 rows in use and 2 new ones",
            "k_cache overflows for sequence 0",
        )  # fmt: skip
    same = {"cache_batch_idx": i32(3, 1, 1), "cache_seqlens": i32(0, 4, 3), "cache_leftpad": None}
    yield Bad(
        "append", same, ValueError, "row 4 of index 1",
        "sequences 2 and 1 would write the same row of k_cache",
    )  # fmt: skip
    table = {"block_table": i32(*[[0, 1], [6, 2], [0, 1]]), "cache_seqlens": i32(3, 8, 4)}
    yield Bad(
        "paged", table, ValueError, "row 4 of page 0",
        "sequences 0 and 2 would write the same row of k_cache",
    )  # fmt: skip
    table = {
        "k_cache": normal((7, 1, HEADS_K, HEAD_DIM), seed=2),
        "v_cache": normal((7, 1, HEADS_K, HEAD_DIM), seed=3),
        "block_table": i32(*[[0, 1], [5, 5], [2, 3]]),
        "cache_seqlens": 0,
    }
    yield Bad(
        "paged", table, ValueError, "row 0 of page 5",
        "sequences 1 and 1 would write the same row of k_cache",
    )  # fmt: skip


def page_cases() -> Iterator[Bad]:
    for value in (-1, 7, -(2**31), 2**31 - 1):
        table = i32(*[[0, 1], [6, value], [3, 4]])
        what = "block_table[1][1] is no page of the cache"
        yield Bad("paged", {"block_table": table}, ValueError, str(value), what)
        wide = table.astype(np.int64)
        wide[1, 1] += 2**33
        yield Bad("paged", {"block_table": wide}, ValueError, str(value + 2**33), what)
    for dims in ((2, 2), (4, 2), (3,), (3, 2, 1)):
        table = np.zeros(dims, np.int32)
        what = "block_table has the wrong shape"
        yield Bad("paged", {"block_table": table}, ValueError, str(dims), what)
    chosen = {"cache_batch_idx": i32(2, 0, 3), "cache_seqlens": i32(0, 1, 0)}
    what = "cache_batch_idx[2] is out of range"
    yield Bad("paged", chosen, ValueError, "0 to 2, a row of block_table", what)
    twice = {"cache_batch_idx": i32(2, 0, 2), "cache_seqlens": i32(3, 1, 2)}
    yield Bad(
        "paged", twice, ValueError, "row 3 of page 3",
        "sequences 2 and 0 would write the same row of k_cache",
    )  # fmt: skip
    padded = {"cache_leftpad": i32(0, 10, 5), "cache_seqlens": i32(0, 8, 2)}
    what = "cache_leftpad[2] is out of range"
    yield Bad("paged", padded, ValueError, "0 to 4, the keys in use", what)
    pages = {
        name: np.zeros((7, 0, HEADS_K, HEAD_DIM), np.float32) for name in ("k_cache", "v_cache")
    }
    none = {"k": np.zeros((3, 0, HEADS_K, HEAD_DIM), np.float32), "cache_seqlens": 0}
    yield Bad(
        "paged", pages | none | {"v": none["k"]}, ValueError, "page size 0",
        "k_cache has pages without rows",
    )  # fmt: skip
    for value in (-1, 7):
        table = np.array([[0, 1, 2], [-1, -1, -1], [6, value, 4]])
        what = "block_table[2][1] is no page of the cache"
        yield Bad("paged varlen", {"block_table": table}, ValueError, str(value), what)
    few = np.zeros((3, 2), np.int32)
    yield Bad(
        "paged varlen", {"block_table": few}, ValueError, "2 pages of 5 rows",
        "block_table has too few pages for sequence 2",
    )  # fmt: skip
    yield Bad(
        "append", {"cache_batch_idx": None, "cache_leftpad": None}, ValueError, "got 4",
        "batch differs: the query has 3, k_cache has 4",
    )  # fmt: skip


def append_cases() -> Iterator[Bad]:
    for name in ("k", "v"):
        for dims in (
            (2, 2, HEADS_K, HEAD_DIM), (3, 2, HEADS, HEAD_DIM), (3, 2, HEADS_K, HEAD_DIM + 1),
            (3, HEADS_K, HEAD_DIM), (1, 3, 2, HEADS_K, HEAD_DIM),
        ):  # fmt: skip
            what = f"{name} has the wrong shape"
            yield Bad("append", {name: normal(dims, seed=4)}, ValueError, str(dims), what)
        new = np.zeros((3, 2, HEADS_K, HEAD_DIM), "int32")
        yield Bad("append", {name: new}, TypeError, "int32", f"{name} has the wrong dtype")
        other = "v" if name == "k" else "k"
        yield Bad(
            "append", {name: None, "rotary_cos": None, "rotary_sin": None}, ValueError,
            f"{other} alone", "k and v must be given together",
        )  # fmt: skip
        yield Bad("append", {name: "new"}, TypeError, "'new'", f"{name} is not a tensor")
    rows = normal((3, 1, HEADS_K, HEAD_DIM), seed=4)
    yield Bad(
        "append", {"v": rows}, ValueError, "(3, 1, 2, 8)",
        "v has the wrong shape; got (3, 1, 2, 8); expected (3, 2, 2, 8)",
    )  # fmt: skip
    yield Bad(
        "append", {"k": None, "v": None}, ValueError, "no k and v",
        "rotary_cos and rotary_sin are for new keys",
    )  # fmt: skip
    for value in (-1, -100):
        what = "num_splits is out of range"
        yield Bad("append", {"num_splits": value}, ValueError, str(value), what)
    for value in (1.5, None, "1"):
        what = "num_splits is not an integer"
        yield Bad("append", {"num_splits": value} if value else {"num_splits": "x"}, TypeError,
                  repr(value or "x"), what)  # fmt: skip


def rotary_cases() -> Iterator[Bad]:
    cos, sin = rotary_tables(10, HEAD_DIM)
    for name in ("rotary_cos", "rotary_sin"):
        other = "rotary_sin" if name == "rotary_cos" else "rotary_cos"
        yield Bad("append", {name: None}, ValueError, f"{other} alone", "must be given together")
        short = {"rotary_cos": cos, "rotary_sin": sin} | {name: cos[:9]}
        yield Bad("append", short, ValueError, "got 9", f"{name} has too few positions")
    yield Bad(
        "append", {"rotary_cos": cos[:9], "rotary_sin": sin[:9], "causal": False}, ValueError,
        "got 9", "rotary_cos has too few positions",
    )  # fmt: skip
    one = normal((3, 1, HEADS, HEAD_DIM), seed=1)  # the new rows are more than the queries
    yield Bad(
        "append", {"rotary_cos": cos[:9], "rotary_sin": sin[:9], "q": one}, ValueError,
        "got 9", "rotary_cos has too few positions",
    )  # fmt: skip
    for dims in ((10, 5), (10, 0), (10,), (1, 10, 4)):
        bad = np.zeros(dims, np.float32)
        change = {"rotary_cos": bad, "rotary_sin": bad}
        yield Bad("append", change, ValueError, str(dims), "rotary_cos has the wrong shape")
    narrow = {"rotary_sin": np.ascontiguousarray(sin[:, :2])}
    yield Bad(
        "append", narrow, ValueError, "(10, 2)",
        "rotary_sin has the wrong shape; got (10, 2); expected (positions, 4), as rotary_cos",
    )  # fmt: skip
    for dtype in ("int32", "bool"):
        whole = cos.astype(dtype)
        yield Bad("append", {"rotary_cos": whole}, TypeError, dtype, "rotary_cos has the wrong")
        yield Bad("append", {"rotary_sin": whole}, TypeError, dtype, "rotary_sin has the wrong")
    half = sin.astype(np.float16)
    yield Bad("append", {"rotary_sin": half}, TypeError, "float16", "dtype differs: rotary_cos")
    yield Bad("append", {"rotary_interleaved": 2}, TypeError, "2", "rotary_interleaved is not a")


def extra_cases() -> Iterator[Bad]:
    for good in ("varlen", "append", "paged"):
        for value in (-1, 2**31, -(2**40)):
            what = "attention_chunk is out of range"
            yield Bad(good, {"attention_chunk": value}, ValueError, str(value), what)
        for value in (1.5, 0.0, False, "3", [1]):
            what = "attention_chunk is not an integer"
            yield Bad(good, {"attention_chunk": value}, TypeError, repr(value), what)
        for dims in ((HEADS_K,), (1, HEADS), (HEADS + 1,), ()):
            what = "learnable_sink has the wrong shape"
            sink = np.zeros(dims, np.float32)
            yield Bad(good, {"learnable_sink": sink}, ValueError, str(dims), what)
        for dtype in ("int32", "bool"):
            what = "learnable_sink has the wrong dtype"
            sink = np.zeros(HEADS, dtype)
            yield Bad(good, {"learnable_sink": sink}, TypeError, dtype, what)
        yield Bad(good, {"learnable_sink": 0.5}, TypeError, "0.5", "learnable_sink is not a tensor")


def packed_new_cases() -> Iterator[Bad]:
    """What flash-attention 3 alone has."""
    name = "cu_seqlens_k_new"
    for values, text, what in (
        (i32(2, 5, 3, 8), f"{name}[2] = 3 after 5", f"{name} is not monotone"),
        (i32(2, 3, 3, 10), "got 10", f"{name}[3] is past the end"),
        (i32(-1, 3, 3, 8), "got -1", f"{name}[0] is negative"),
        (i32(2, 3, 8), "(3,)", f"{name} has the wrong shape"),
        (i32(0, 3, 3, 8), "8 rows in use and 3 new ones", "k_cache overflows for sequence 0"),
    ):
        yield Bad("fa3", {name: values}, ValueError, text, what)
    none = dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin"))
    yield Bad("fa3", none, ValueError, "no k", f"{name} is for new keys")
    what = "rotary_seqlens is for new keys that are rotated"
    yield Bad("fa3", {**none, name: None}, ValueError, "a table without k", what)
    angles = {"rotary_cos": None, "rotary_sin": None}
    yield Bad("fa3", angles, ValueError, "a table without rotary_cos", what)
    for value in (-1, 2**31 - 1):
        starts = {"rotary_seqlens": np.array([4, value, 1], np.int64)}
        if value < 0:
            yield Bad("fa3", starts, ValueError, "got -1", "rotary_seqlens[1] is out of range")
        else:
            yield Bad("fa3", starts, ValueError, f"at least {value}", "has too few positions")
    what = "rotary_cos would be read too far"
    far = {"rotary_seqlens": i32(2**31 - 1, 0, 0)}
    yield Bad("fa3", far, umfa.UnsupportedError, str(2**31 + 1), what)
    wide = {"rotary_seqlens": i32(4, 10)}
    yield Bad("fa3", wide, ValueError, "(2,)", "rotary_seqlens has the wrong shape")
    yield Bad("fa3", {"max_seqlen_q": 3}, ValueError, "got 3", "max_seqlen_q is too small")
    dense = {"k": normal((9, 1, HEADS_K, HEAD_DIM), seed=4)}
    yield Bad("fa3", dense, ValueError, "(9, 1, 2, 8)", "k has the wrong shape")
    rows = {x: normal((2, 1, HEADS_K, HEAD_DIM), seed=4) for x in "kv"} | {name: None}
    yield Bad("fa3", rows, ValueError, "a batch of 3, as cu_seqlens_q", "k has the wrong shape")
    few = {"cache_batch_idx": None}
    yield Bad("fa3", few, ValueError, "(4, 2)", "page_table has the wrong shape")
    table = i32(*[[0, -1], [6, 2], [3, 99], [-1, 7]])
    what = "page_table[3][1] is no page of the cache"
    yield Bad("fa3", {"page_table": table}, ValueError, "got 7", what)
    # Where padding reaches into the new rows, those before its end are written.
    padded = {
        "cache_leftpad": i32(6, 0, 4),
        "page_table": i32(*[[0, -1], [-1, 2], [3, 4], [-1, 4]]),
    }
    what = "page_table[1][0] is no page of the cache"
    yield Bad("fa3", padded, ValueError, "got -1", what)


CASES = [
    *offset_cases(), *length_cases(), *overflow_cases(), *page_cases(), *append_cases(),
    *rotary_cases(), *extra_cases(), *packed_new_cases(),
]  # fmt: skip


def contents(arguments: dict[str, Any], framework: Framework) -> dict[str, bytes]:
    return {
        name: framework.bits(x).tobytes()
        for name, x in arguments.items()
        if isinstance(x, framework.array_type)
    }


def assert_refused(
    function: str,
    arguments: dict[str, Any],
    framework: Framework,
    error: type[Exception],
    *texts: str,
) -> None:
    before = contents(arguments, framework)
    with pytest.raises(Exception) as caught:  # noqa: PT011  which one is asserted below
        attrgetter(function)(umfa)(**arguments)
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    prefix = f"[umfa.{function}] "
    assert message.startswith(prefix)
    assert "; got " in message
    assert "; expected " in message
    assert len(message) < 1000
    for text in texts:
        assert text in message
    assert contents(arguments, framework) == before, "an input was changed"
    possible, reason = umfa.can_run(attrgetter(function)(umfa), **arguments)
    assert possible is False
    assert reason == message.replace(prefix, "[umfa.can_run] ", 1)


@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("good", GOOD)
def test_good_calls_are_good(good: str, framework: Framework) -> None:
    arguments = Bad(good, {}, ValueError, "", "").arguments(framework)
    function = attrgetter(GOOD[good][0])(umfa)
    assert umfa.can_run(function, **arguments) == (True, "")
    function(**arguments)


def test_labels_are_unique() -> None:
    labels = [f"{bad}-{[getattr(x, 'dtype', x) for x in bad.change.values()]}" for bad in CASES]
    assert len(CASES) > 200
    assert len(set(labels)) > 0.9 * len(CASES)


@pytest.mark.parametrize(
    "framework", [pytest.param("numpy", marks=pytest.mark.sanitize), "torch"], indirect=True
)
@pytest.mark.parametrize("bad", CASES, ids=str)
def test_bad_call(bad: Bad, framework: Framework) -> None:
    arguments = bad.arguments(framework)
    assert_refused(GOOD[bad.good][0], arguments, framework, bad.error, bad.offending, bad.what)


@pytest.mark.parametrize("framework", ["jax", "mlx"], indirect=True)
@pytest.mark.parametrize("bad", [bad for bad in CASES if "varlen" in bad.good], ids=str)
def test_bad_tables_of_immutable_frameworks(bad: Bad, framework: Framework) -> None:
    wide = any(isinstance(x, np.ndarray) and x.dtype == np.int64 for x in bad.change.values())
    if framework.name == "jax" and wide:
        pytest.skip("jax has no int64 unless told so")
    arguments = bad.arguments(framework)
    if framework.name == "jax":  # the good call's int64
        arguments = {k: np.asarray(x) if k == "block_table" else x for k, x in arguments.items()}
    assert_refused(GOOD[bad.good][0], arguments, framework, bad.error, bad.offending, bad.what)


@pytest.mark.parametrize("framework", ["jax", "mlx"], indirect=True)
@pytest.mark.parametrize("good", ["append", "paged"])
def test_immutable_caches(good: str, framework: Framework) -> None:
    arguments = Bad(good, {}, ValueError, "", "").arguments(framework)
    assert_refused(
        KVCACHE, arguments, framework, umfa.UnsupportedError, "k_cache would have to be written",
        f"{framework.name} arrays",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
@pytest.mark.parametrize("good", ["append", "paged"])
def test_read_only_caches(name: str, good: str) -> None:
    numpy = array_libraries.load("numpy")
    arguments = Bad(good, {}, ValueError, "", "").arguments(numpy)
    arguments[name].flags.writeable = False
    assert_refused(KVCACHE, arguments, numpy, ValueError, f"{name} is read-only")


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_expanded_caches(name: str) -> None:
    torch = array_libraries.load("torch")
    arguments = Bad("append", {}, ValueError, "", "").arguments(torch)
    arguments[name] = arguments[name][:1].expand(4, -1, -1, -1)
    assert_refused(KVCACHE, arguments, torch, ValueError, f"{name} has elements that share memory")


@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize(
    ("written", "read"),
    [("k_cache", "v_cache"), ("k_cache", "k"), ("v_cache", "k"), ("v_cache", "v")],
)
def test_overlapping_caches(written: str, read: str, framework: Framework) -> None:
    arguments = Bad("append", {}, ValueError, "", "").arguments(framework)
    arguments[read] = arguments[written] if read == "v_cache" else arguments[written][:3, :2]
    use = "also written" if read == "v_cache" else "still being read"
    assert_refused(
        KVCACHE, arguments, framework, ValueError,
        f"{written} overlaps {read} in memory; got overlapping ranges of addresses; "
        f"expected memory of its own, since {read} is {use}",
    )  # fmt: skip


def test_masked_arrays() -> None:
    numpy = array_libraries.load("numpy")
    for good, name in (("varlen", "cu_seqlens_q"), ("append", "cache_seqlens")):
        arguments = Bad(good, {}, ValueError, "", "").arguments(numpy)
        arguments[name] = np.ma.masked_array(arguments[name])
        text = f"{name} is a masked array"
        assert_refused(GOOD[good][0], arguments, numpy, TypeError, text)


@pytest.mark.parametrize("dtype", ["bfloat16", "U1", "complex64"])
def test_odd_numpy_tables(dtype: str) -> None:
    numpy = array_libraries.load("numpy")
    for good, name in (("varlen", "seqused_k"), ("append", "cache_seqlens")):
        arguments = Bad(good, {}, ValueError, "", "").arguments(numpy)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        arguments[name] = np.array([0, 0, 0]).astype(kind)
        assert_refused(GOOD[good][0], arguments, numpy, TypeError, name)


def test_cu_seqlens_missing() -> None:
    numpy = array_libraries.load("numpy")
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments = Bad("varlen", {}, ValueError, "", "").arguments(numpy) | {name: None}
        assert_refused(VARLEN, arguments, numpy, TypeError, f"{name} is missing", "None")


@pytest.mark.parametrize("framework", ["mlx"], indirect=True)
def test_tables_that_are_traced(framework: Framework) -> None:
    """In JAX they are buffers of the program: test_jax_gradients.py."""
    arguments = Bad("varlen", {}, ValueError, "", "").arguments(framework)
    table = arguments.pop("cu_seqlens_q")
    traced = importlib.import_module("mlx.core").compile
    with pytest.raises(umfa.UnsupportedError, match="cu_seqlens_q is being traced"):
        traced(lambda x: umfa.flash_attn_varlen_func(cu_seqlens_q=x, **arguments))(table)


def test_expanded_tables_of_any_length() -> None:
    """Of a row of pages without end only what is used counts."""
    torch = array_libraries.load("torch")
    arguments = Bad("paged", {}, ValueError, "", "").arguments(torch)
    page = torch.module.tensor([[0], [6], [3]], dtype=torch.module.int32)
    plain = arguments | {"block_table": page, "cache_seqlens": 1}
    found = []
    for length in (1, 2**40, 2**61):
        caches = {name: plain[name].clone() for name in ("k_cache", "v_cache")}
        wide = page.expand(3, length)
        found.append(umfa.flash_attn_with_kvcache(**(plain | caches | {"block_table": wide})))
    assert all(torch.module.equal(x, found[0]) for x in found)
    used = torch.module.tensor([0, 2**31 + 4, 0])
    refused = {"block_table": page.expand(3, 2**40), "cache_seqlens": used, "k": None, "v": None}
    endless = {k: x for k, x in (plain | refused).items() if not k.startswith("rotary")}
    with pytest.raises(ValueError, match=rf"is too long; got {2**31 + 4}; expected at most"):
        umfa.flash_attn_with_kvcache(**endless)
