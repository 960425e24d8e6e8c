"""Tables on torch's MPS device, which kernels read and the host does not.

On the stand-in for torch's stream. No part of it is Apple's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.checks import BASE, assert_close
from tools.metal.double import Double

torch = pytest.importorskip("torch")

import umfa.torch  # noqa: E402
from tests.metal.host.torch_mps import TorchMps, standing_in  # noqa: E402
from umfa._frameworks import _torch_tables  # noqa: E402


def mostly_slow(names: Iterable[str]) -> list[Any]:
    """All but the first."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.fixture
def mps(double: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchMps]:
    """A Mac with an MPS device: umfa plans for the double's GPU."""
    with standing_in(monkeypatch) as device:
        yield device


@pytest.fixture(autouse=True)
def nothing_is_left(mps: TorchMps) -> Iterator[None]:
    """A test that ends with a fault nobody has been told of is wrong."""
    yield
    mps.finish()
    _torch_tables.check()


def numbers(mps: TorchMps, *shape: int, dtype: Any = torch.float16) -> Any:
    generator = torch.Generator().manual_seed(sum(shape))
    return mps.tensor(torch.randn(shape, generator=generator).to(dtype))


def table(mps: TorchMps, values: Any, dtype: Any = torch.int32) -> Any:
    return mps.tensor(torch.tensor(values, dtype=dtype))


def in_stream(mps: TorchMps, call: Callable[..., Any]) -> Any:
    """The call's result. Nothing has run when it returns, and nothing has waited."""
    before, waits = umfa.stats(), mps.waits
    out = call()
    after = umfa.stats()
    assert mps.waits == waits
    assert after.waits == before.waits
    assert after.plans_in_stream == before.plans_in_stream + 1
    assert mps.poisoned(out)
    return out


def test_lengths_of_a_cache(mps: TorchMps) -> None:
    """Keys in use: as many splits as where the host knows the lengths, and the same bits."""
    q, k, v = (numbers(mps, 3, rows, 2, 64) for rows in (1, 700, 700))
    lengths = [700, 0, 133]
    out = in_stream(
        mps, lambda: umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=table(mps, lengths))
    )
    assert mps.launched[0] == "tables"
    known = umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    assert np.array_equal(mps.read(out), mps.read(known))
    for b, length in enumerate(lengths):
        wanted, _ = reference.attention(
            *(mps.read(x)[b : b + 1, : None if x is q else length] for x in (q, k, v))
        )
        assert_close(mps.read(out)[b : b + 1], wanted, BASE["float16"])


def test_entries_may_change_until_the_call_runs(mps: TorchMps) -> None:
    """A decode loop that counts on the device: umfa reads what is there in the stream's order."""
    q, k, v = (numbers(mps, 2, rows, 2, 64) for rows in (1, 300, 300))
    lengths = table(mps, [5, 200], torch.int64)
    first = in_stream(mps, lambda: umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths))
    mps.queue.append(lambda: lengths.add_(31))  # an operation of torch's, in its stream
    second = in_stream(mps, lambda: umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths))
    umfa.torch.synchronize()
    assert lengths.tolist() == [36, 231]
    for out, at in ((first, [5, 200]), (second, [36, 231])):
        known = umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=at)
        assert np.array_equal(mps.read(out), mps.read(known))


PACKED = {
    "offsets": {},
    "lengths in use": {"seqused_q": [20, 0, 40, 9], "seqused_k": [3, 0, 60, 100]},
    "prefix": {"prefix_lens": [3, 9, 0, 100]},
}


@pytest.mark.parametrize("name", mostly_slow(PACKED))
def test_packed_sequences(mps: TorchMps, name: str) -> None:
    """Rows of no sequence are cleared, as where the host knows which these are."""
    q, k, v = numbers(mps, 170, 4, 64), numbers(mps, 320, 2, 64), numbers(mps, 320, 2, 64)
    offsets = [[0, 30, 30, 95, 160], [0, 10, 50, 120, 300]]

    def call(make: Callable[[Any], Any]) -> Any:
        tables = {name: make(values) for name, values in PACKED[name].items()}
        return umfa.flash_attn_varlen_func(
            q, k, v, *map(make, offsets), 65, 180, causal=True, **tables
        )

    out = in_stream(mps, lambda: call(lambda values: table(mps, values)))
    known = call(lambda values: values)
    assert np.array_equal(mps.read(out), mps.read(known))
    assert (mps.read(out)[160:] == 0).all()


@pytest.mark.parametrize("rows", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_pages(mps: TorchMps, rows: int) -> None:
    """What the table says of pages that are not in use may be anything."""
    q, k, v = numbers(mps, 3, rows, 4, 64), numbers(mps, 8, 16, 2, 64), numbers(mps, 8, 16, 2, 64)
    tables = {
        "block_table": [[3, 1, 0, 99], [2, -5, 7, 7], [4, 5, 6, 99]],
        "cache_seqlens": [40, 3, 48],
        "cache_batch_idx": [2, 1, 0],
        "cache_leftpad": [0, 2, 33],
    }

    def call(make: Callable[[Any], Any]) -> Any:
        given = {name: make(values) for name, values in tables.items()}
        return umfa.flash_attn_with_kvcache(q, k, v, causal=True, **given)

    out = in_stream(mps, lambda: call(lambda values: table(mps, values)))
    assert np.array_equal(mps.read(out), mps.read(call(lambda values: values)))


GROWING = {
    "rows": {},
    "pages": {"block_table": [[3, 1, 0, 9], [2, 6, 5, 7]]},
    "chosen rows": {"cache_batch_idx": [5, 0]},
    "padding": {"cache_leftpad": [2, 0]},
}


@pytest.mark.parametrize("name", mostly_slow(GROWING))
def test_a_cache_grows_by_lengths_on_the_device(mps: TorchMps, name: str) -> None:
    """As where the host knows them: the same rows of the cache, and the same bits."""
    batch = 8 if name in ("pages", "chosen rows") else 2
    size = 16 if name == "pages" else 60
    angles = [numbers(mps, 64, 16, dtype=torch.float32) for _ in "cs"]
    q, new_k, new_v = (numbers(mps, 2, 3, heads, 64) for heads in (4, 2, 2))

    def steps(make: Callable[[Any], Any], add: Callable[[Any], Any]) -> list[Any]:
        caches = [numbers(mps, batch, size, 2, 64) for _ in "kv"]
        lengths = make([5, 14])
        tables = {key: make(values) for key, values in GROWING[name].items()}
        outs = []
        for _ in range(3):
            outs.append(
                umfa.flash_attn_with_kvcache(
                    q, *caches, new_k, new_v, *angles, cache_seqlens=lengths, causal=True, **tables
                )
            )
            lengths = add(lengths)
        return [*outs, *caches]

    def add_later(lengths: Any) -> Any:
        mps.queue.append(lambda: lengths.add_(3))
        return lengths

    found = steps(lambda values: table(mps, values), add_later)
    assert mps.waits == 0
    known = steps(lambda values: values, lambda lengths: [n + 3 for n in lengths])
    for a, b in zip(found, known, strict=True):
        assert np.array_equal(mps.read(a), mps.read(b))


APPENDED_BAD = {
    "no room": ({"cache_seqlens": [58, 5]}, r"cache_seqlens\[0\] .*got 58; expected 0 to 57"),
    "no angle": ({"cache_seqlens": [30, 5]}, r"sequence 0 has positions behind .*got 30; expected"),
    "the same rows": (
        {"cache_seqlens": [5, 7], "cache_batch_idx": [1, 1]},
        r"sequence 1 would write rows that a sequence before it.*got 0",
    ),
    "the same page": (
        {"cache_seqlens": [5, 7], "block_table": [[1, 0], [1, 0]]},
        r"sequence 1 would write rows that a sequence before it.*got 0",
    ),
}


@pytest.mark.parametrize("name", mostly_slow(APPENDED_BAD))
def test_appended_rows_out_of_range(mps: TorchMps, name: str) -> None:
    given, text = APPENDED_BAD[name]
    angles = [numbers(mps, 20, 16, dtype=torch.float32) for _ in "cs"] if name == "no angle" else []
    q, k, v, new_k, new_v = (numbers(mps, 2, n, 2, 64) for n in (1, 60, 60, 3, 3))
    tables = {key: table(mps, values) for key, values in given.items()}
    in_stream(mps, lambda: umfa.flash_attn_with_kvcache(q, k, v, new_k, new_v, *angles, **tables))
    with pytest.raises(ValueError, match=text):
        umfa.torch.synchronize()


def test_one_table_on_the_host(mps: TorchMps) -> None:
    """What the host sees of it is refused at once."""
    q, k, v = numbers(mps, 2, 1, 4, 64), numbers(mps, 8, 16, 2, 64), numbers(mps, 8, 16, 2, 64)
    pages = table(mps, [[3, 1], [2, 5]])
    out = in_stream(
        mps, lambda: umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=[20, 3], block_table=pages)
    )
    known = umfa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=[20, 3], block_table=[[3, 1], [2, 5]]
    )
    assert np.array_equal(mps.read(out), mps.read(known))
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\] is out of range; got 33"):
        umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=[33, 3], block_table=pages)


# What a call gets, and what the error says of it.
BAD = {
    "cache_seqlens": ([5, 301], r"cache_seqlens\[1\] .*got 301; expected 0 to 300"),
    "negative": ([-1, 5], r"cache_seqlens\[0\] .*got -1; expected 0 to 300"),
    "leftpad": ([7, 5], r"cache_leftpad\[1\] .*got 6; expected 0 to 5"),
    "index": ([5, 5], r"cache_batch_idx\[0\] .*got 2; expected 0 to 1"),
}


def cache_call(mps: TorchMps, name: str) -> Any:
    q, k, v = (numbers(mps, 2, rows, 2, 64) for rows in (1, 300, 300))
    tables = {"cache_seqlens": table(mps, BAD[name][0], torch.int64)}
    if name == "leftpad":
        tables["cache_leftpad"] = table(mps, [6, 6])
    if name == "index":
        tables["cache_batch_idx"] = table(mps, [2, -1])
    return umfa.flash_attn_with_kvcache(q, k, v, **tables)


@pytest.mark.parametrize("name", BAD)
def test_what_is_out_of_range_is_clamped_and_reported(mps: TorchMps, name: str) -> None:
    """The emulator stops a kernel that leaves a tensor."""
    out = in_stream(mps, lambda: cache_call(mps, name))
    with pytest.raises(ValueError, match=r"\[umfa.flash_attn_with_kvcache\] " + BAD[name][1]):
        umfa.torch.synchronize()
    assert np.isfinite(mps.read(out)).all()
    umfa.torch.synchronize()  # once


PACKED_BAD = {
    "decreasing": ({"q": [0, 50, 20, 60]}, r"cu_seqlens_q\[2\] .*got 20; expected 50 to"),
    "past the end": ({"q": [0, 50, 55, 61]}, r"cu_seqlens_q\[3\] .*got 61; expected 55 to 60"),
    "negative": ({"k": [-3, 50, 55, 60]}, r"cu_seqlens_k\[0\] .*got -3; expected 0 to 60"),
    "many rows": ({"q": [0, 60, 0, 60]}, r"cu_seqlens_q\[2\] .*got 0; expected 60 to 60"),
    "longer than promised": ({"max_q": 49}, r"cu_seqlens_q\[1\] .*got 50; expected 0 to 49"),
    "keys than promised": ({"max_k": 49}, r"sequence 0 has more keys than max_seqlen_k .*got 50"),
    "queries in use": ({"used": [50, 6, 5]}, r"seqused_q\[1\] .*got 6; expected 0 to 5"),
    "prefix": ({"prefix": [50, -6, 5]}, r"prefix_lens\[1\] .*got -6; expected 0 to"),
}


@pytest.mark.parametrize("name", mostly_slow(PACKED_BAD))
def test_offsets_out_of_range(mps: TorchMps, name: str) -> None:
    given, text = PACKED_BAD[name]
    x = numbers(mps, 60, 2, 64)
    offsets = [table(mps, given.get(side, [0, 50, 55, 60])) for side in "qk"]
    tables = {
        full: table(mps, given[short])
        for short, full in (("used", "seqused_q"), ("prefix", "prefix_lens"))
        if short in given
    }
    out = in_stream(
        mps,
        lambda: umfa.flash_attn_varlen_func(
            x, x, x, *offsets, given.get("max_q", 60), given.get("max_k", 60), **tables
        ),
    )
    with pytest.raises(ValueError, match=r"\[umfa.flash_attn_varlen_func\] " + text):
        umfa.torch.synchronize()
    assert np.isfinite(mps.read(out)).all()


def test_pages_out_of_range(mps: TorchMps) -> None:
    q, k, v = numbers(mps, 2, 1, 2, 64), numbers(mps, 8, 16, 2, 64), numbers(mps, 8, 16, 2, 64)
    pages, lengths = table(mps, [[1, 2, 99], [3, 8, -1]]), table(mps, [20, 40])
    in_stream(
        mps,
        lambda: umfa.flash_attn_with_kvcache(q, k, v, block_table=pages, cache_seqlens=lengths),
    )
    with pytest.raises(ValueError, match=r"block_table\[1\]\[1\] .*got 8; expected 0 to 7"):
        umfa.torch.synchronize()


def test_each_call_has_a_flag_of_its_own(mps: TorchMps) -> None:
    """The first is reported, whatever comes behind it, and the others are counted."""
    x = numbers(mps, 60, 2, 64)
    good, bad = table(mps, [0, 50, 60]), table(mps, [0, 50, 70])
    umfa.flash_attn_varlen_func(x, x, x, good, good, 60, 60)
    cache_call(mps, "negative")
    umfa.flash_attn_varlen_func(x, x, x, bad, good, 60, 60)
    last = umfa.flash_attn_varlen_func(x, x, x, good, good, 60, 60)
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\].*1 later calls had others") as raised:
        umfa.torch.synchronize()
    assert "cu_seqlens" not in str(raised.value)
    assert np.isfinite(mps.read(last)).all()


def test_the_next_call_that_waits_reports(mps: TorchMps) -> None:
    """It has done nothing itself then."""
    cache_call(mps, "negative")
    x = numbers(mps, 60, 2, 64).requires_grad_()
    offsets = table(mps, [0, 50, 60])
    launched = len(mps.launched)
    with pytest.raises(ValueError, match=r"flash_attn_with_kvcache\] cache_seqlens\[0\]"):
        umfa.flash_attn_varlen_func(x, x, x, offsets, offsets, 60, 60)
    assert len(mps.launched) == launched


def test_umfa_looks_by_itself_in_the_end(mps: TorchMps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that never waits is told, too."""
    monkeypatch.setattr(_torch_tables, "PLACES", 8)
    cache_call(mps, "negative")
    for _ in range(2):
        cache_call(mps, "cache_seqlens")
    assert mps.waits == 0
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\].*2 later calls had others|3 later"):
        cache_call(mps, "cache_seqlens")
    assert mps.waits == 1


def test_inference_mode(mps: TorchMps) -> None:
    """Its tensors may not be written outside of it."""
    tensors = [numbers(mps, 2, rows, 2, 64) for rows in (1, 300, 300)]
    lengths = table(mps, [5, 301])
    with torch.inference_mode():
        umfa.flash_attn_with_kvcache(*tensors, cache_seqlens=lengths)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]"):
        umfa.torch.synchronize()


def test_warmup_compiles_what_the_call_launches(mps: TorchMps) -> None:
    q, k, v = (numbers(mps, 2, rows, 2, 64) for rows in (1, 300, 300))
    lengths = table(mps, [5, 200])
    done = umfa.warmup(umfa.flash_attn_with_kvcache, q, k, v, cache_seqlens=lengths)
    assert done[:3] == ("metal", 3, 3)
    umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    assert len(mps.compiled) == len(mps.launched) == 3
    assert mps.waits == 0


def test_shapes_and_dtypes_are_refused_at_once(mps: TorchMps) -> None:
    """By the error of tables that the host reads."""
    q, k, v = (numbers(mps, 2, rows, 2, 64) for rows in (1, 300, 300))
    for lengths, text in (
        (table(mps, [1, 2, 3]), "wrong shape"),
        (table(mps, [1, 2], torch.uint8), "wrong dtype"),
    ):
        with pytest.raises((ValueError, TypeError), match=r"cache_seqlens has the " + text):
            umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    assert mps.launched == []


WAITING = {
    "gradients": lambda _, x, t: umfa.flash_attn_varlen_func(
        x.requires_grad_(), x, x, t([0, 50, 60]), t([0, 50, 60]), 60, 60
    ),
    "dropout without a seed": lambda _, x, t: umfa.flash_attn_varlen_func(
        x, x, x, t([0, 50, 60]), t([0, 50, 60]), 60, 60, dropout_p=0.5
    ),
    "a mask shorter than the cache": lambda mps, x, t: umfa.flash_attn_with_kvcache(
        x[None, :1], *(numbers(mps, 1, 60, 2, 64) for _ in "kv"), cache_seqlens=t([40]),
        attn_mask=numbers(mps, 1, 1, 1, 40),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weights are dropped")
@pytest.mark.parametrize("name", WAITING)
def test_what_waits_says_so(mps: TorchMps, name: str) -> None:
    x = numbers(mps, 60, 2, 64)
    before = umfa.stats().waits
    WAITING[name](mps, x, lambda values: table(mps, values))
    more = {x for x, n in umfa.stats().waits.items() if n != before.get(x, 0)}
    assert more
    assert all(x.endswith("is a table on the GPU, which the host reads") for x in more)
