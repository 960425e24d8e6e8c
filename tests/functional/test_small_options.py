"""Ways to write an option that mean the same."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries as libraries
from tests.array_libraries import Array
from tests.cases import normal
from tests.checks import assert_same_bits
from umfa import fa3

pytestmark = pytest.mark.cpu_only

Q, K, V = (normal((2, n, 2, 8), seed=i) for i, n in enumerate((7, 12, 12)))


def result(**options: Any) -> Array:
    return umfa.flash_attn_func(Q, K, V, **options)


def numbers(name: str, value: float | int | bool) -> list[Any]:
    """The value as tensors without dimensions of every framework."""
    found: list[Any] = [np.asarray(value), np.asarray(value)[()]]
    for library in ("torch", "jax", "mlx"):
        try:
            framework = libraries.load(library)
        except pytest.skip.Exception:
            continue
        found.append(framework.tensor(np.asarray(value)))
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [("softmax_scale", 0.5), ("softcap", 4.0), ("causal", True), ("attention_chunk", 3)],
)
def test_numbers_may_be_tensors_without_dimensions(name: str, value: Any) -> None:
    expected = result(**{name: value})
    assert expected.tobytes() != result().tobytes()
    narrow = {float: np.float32, bool: np.bool_, int: np.int32}[type(value)]
    for given in numbers(name, narrow(value)):
        assert result(**{name: given}).tobytes() == expected.tobytes(), type(given)


@pytest.mark.parametrize("name", ["softmax_scale", "attention_chunk", "causal", "num_splits"])
def test_tensors_with_dimensions_are_no_numbers(name: str) -> None:
    torch = libraries.load("torch").module
    for given in (torch.tensor([1]), np.array([1]), torch.tensor([[1]])):
        with pytest.raises(TypeError, match=f"{name} is not a"):
            result(**{name: given})


def test_a_number_that_requires_grad_is_refused() -> None:
    torch = libraries.load("torch").module
    scale = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(umfa.UnsupportedError, match="softmax_scale requires grad, which would be"):
        result(softmax_scale=scale)
    with pytest.raises(TypeError, match="softmax_scale is not a number; got tensor"):
        result(softmax_scale=torch.tensor(0.5, device="meta"))


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        (None, (-1, -1)), ((None, None), (-1, -1)), ((None, 0), (-1, 0)), ([2, None], (2, -1)),
        ([2, 1], (2, 1)), (np.array([2, 1]), (2, 1)), (np.array([2, -1], np.int8), (2, -1)),
    ],
    ids=repr,
)  # fmt: skip
def test_windows(given: Any, pair: tuple[int, int]) -> None:
    assert result(window_size=given).tobytes() == result(window_size=pair).tobytes()


@pytest.mark.parametrize("library", ["torch", "jax", "mlx"])
def test_windows_of_frameworks(library: str) -> None:
    window = libraries.load(library).tensor(np.array([2, 1], np.int32))
    assert result(window_size=window).tobytes() == result(window_size=(2, 1)).tobytes()


def test_none_is_the_default() -> None:
    assert result(softcap=None, causal=None, window_size=None).tobytes() == result().tobytes()
    with pytest.raises(TypeError, match="is_causal is not a bool; got None"):
        umfa.scaled_dot_product_attention(Q, Q, Q, is_causal=None)


def test_tables_may_be_lists() -> None:
    tensors = [x.reshape(-1, 2, 8) for x in (Q, K, V)]
    expected = umfa.flash_attn_varlen_func(
        *tensors, np.array([0, 5, 14]), np.array([0, 9, 24]), 9, 15
    )
    found = umfa.flash_attn_varlen_func(*tensors, [0, 5, 14], (0, 9, 24), 9, 15)
    assert found.tobytes() == expected.tobytes()
    found = umfa.flash_attn_with_kvcache(Q, K, V, cache_seqlens=[12, 3])
    expected = umfa.flash_attn_with_kvcache(Q, K, V, cache_seqlens=np.array([12, 3]))
    assert found.tobytes() == expected.tobytes()
    with pytest.raises(TypeError, match=r"cu_seqlens_q\[0\] is not an integer; got 0.0"):
        umfa.flash_attn_varlen_func(*tensors, [0.0, 14.0], [0, 24], 14, 24)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_the_error_names_what_the_caller_wrote(num_splits: int) -> None:
    sink = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="s_aux has the wrong shape"):
        result(s_aux=sink)
    with pytest.raises(ValueError, match="learnable_sink and s_aux exclude each other; got both"):
        result(s_aux=sink, learnable_sink=sink)
    with pytest.raises(ValueError, match="cache_seqlens"):
        umfa.flash_attn_with_kvcache(Q, K, V, cache_seqlens=[13, 1], num_splits=num_splits)


def test_options_that_are_kept_do_not_keep_the_tensors() -> None:
    """Calls with the same options share them, for as long as the process lives."""
    q = Q.copy()
    alive = weakref.ref(q)
    umfa.flash_attn_func(q, K, V, softmax_scale=0.123)
    del q
    assert alive() is None


LENGTHS: tuple[tuple[Any, str], ...] = (
    ([1, [2]], "prefix_lens[1] is not an integer; got [2]; expected an integer"),
    ([[1], 2], "prefix_lens[1] is no row like the first; got int; expected a list of 1 integers"),
    ([[1], [2, 3]], "prefix_lens[1] is no row like the first; got 2 entries"),
    ([None, 1], "prefix_lens[0] is not an integer; got None"),
    ([2**70, 1], "prefix_lens[0] does not fit 64 bits; got 1180591620717411303424"),
    (["3", "6"], "prefix_lens[0] is not an integer; got '3'"),
    ([1.0, 2], "prefix_lens[0] is not an integer; got 1.0"),
    ([True, 2], "prefix_lens[0] is not an integer; got True"),
)


@pytest.mark.parametrize(("table", "text"), LENGTHS, ids=lambda x: repr(x)[:20])
def test_lists_that_are_no_tables(table: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        umfa.flash_attn_func(Q, K, K, prefix_lens=table)
    assert str(caught.value).startswith("[umfa.flash_attn_func] " + text)
    possible, reason = umfa.can_run(Q, K, K, prefix_lens=table)
    assert not possible
    assert reason.startswith("[umfa.can_run] " + text)


def test_lists_of_tensors_that_have_no_number_now() -> None:
    torch = pytest.importorskip("torch")
    endless: list[Any] = []
    endless.append(endless)
    learnt = torch.tensor(1.0, requires_grad=True)
    for table in ([torch.empty((), device="meta", dtype=torch.int32), 2], [learnt, 2], endless):
        possible, reason = umfa.can_run(Q, K, K, prefix_lens=table)
        assert not possible
        assert reason.startswith("[umfa.can_run] prefix_lens[0]")


def test_empty_tables() -> None:
    for table in ([], np.zeros(0, np.int64)):
        assert umfa.flash_attn_func(Q[:0], K[:0], K[:0], prefix_lens=table).shape == Q[:0].shape
        found = umfa.flash_attn_with_kvcache(Q[:0], K[:0], K[:0], cache_seqlens=table)
        assert found.shape == Q[:0].shape


def test_tables_in_another_byte_order() -> None:
    table = np.array([3, 1], ">i4")
    expected = umfa.flash_attn_func(Q, K, K, causal=True, prefix_lens=[3, 1])
    assert_same_bits(umfa.flash_attn_func(Q, K, K, causal=True, prefix_lens=table), expected)


def test_one_length_for_all_sequences() -> None:
    """A number, or a tensor without dimensions, beside tables of any form."""
    expected = umfa.flash_attn_with_kvcache(Q, K, K, cache_seqlens=np.array([5, 5]))
    packed = Q.reshape(-1, *Q.shape[2:])
    starts = [0, Q.shape[1], 2 * Q.shape[1]]
    for length in (5, np.int32(5), np.array(5)):
        assert_same_bits(umfa.flash_attn_with_kvcache(Q, K, K, cache_seqlens=length), expected)
        for table in (starts, tuple(starts), np.array(starts, np.int32)):
            found = fa3.flash_attn_with_kvcache(
                packed, K, K, cache_seqlens=length, cu_seqlens_q=table, max_seqlen_q=Q.shape[1]
            )
            assert_same_bits(found.reshape(Q.shape), expected)


def test_can_run_knows_what_is_no_function_of_umfa() -> None:
    for function in (print, umfa.can_run, fa3.get_scheduler_metadata, np.add, lambda q: q):
        possible, reason = umfa.can_run(function, Q, K, K)
        assert not possible
        assert reason.startswith("[umfa.can_run] the function is not known; got ")
    assert umfa.can_run(umfa.flash_attn_func, Q, K, K) == umfa.can_run(Q, K, K) == (True, "")
