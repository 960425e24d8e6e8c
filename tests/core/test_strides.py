"""Where the numbers lie in memory must not matter: every view gives the bits of its copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import DTYPES, Array
from tests.cases import normal
from tests.checks import BASE, assert_close, assert_same_bits

if TYPE_CHECKING:
    from tests.attend import Attend

BATCH, SEQLEN, HEADS, HEAD_DIM = SHAPE = (2, 96, 3, 64)
BSHD_FROM_BHSD = (0, 2, 1, 3)


def assert_views_equal_copies(
    attend: Attend, views: tuple[Any, Any, Any], **options: Any
) -> tuple[Array, Array]:
    """Attend to views and to contiguous copies of them; returns the copies' result."""
    fw = attend.framework
    copies = [fw.tensor(fw.numpy(view)) for view in views]
    before = [fw.bits(view) for view in views]
    of_views = attend(*views, **options)
    of_copies = attend(*copies, **options)
    assert_same_bits(fw.bits(of_views.out), fw.bits(of_copies.out), "out")
    assert_same_bits(fw.bits(of_views.lse), fw.bits(of_copies.lse), "lse")
    for name, view, bits in zip(("query", "key", "value"), views, before, strict=True):
        assert_same_bits(fw.bits(view), bits, f"{name} after the call")
    return fw.numpy(of_copies.out), fw.numpy(of_copies.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a20_bhsd_memory_seen_as_bshd(dtype: str, attend: Attend) -> None:
    fw = attend.framework
    views = tuple(
        fw.permute(
            fw.tensor(normal((BATCH, HEADS, SEQLEN, HEAD_DIM), dtype, seed=i)), BSHD_FROM_BHSD
        )
        for i in range(3)
    )
    assert_views_equal_copies(attend, views)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a21_slices_of_packed_qkv(dtype: str, causal: bool, attend: Attend) -> None:
    fw = attend.framework
    packed = fw.tensor(normal((BATCH, SEQLEN, 3, HEADS, HEAD_DIM), dtype, seed=0))
    views = (packed[:, :, 0], packed[:, :, 1], packed[:, :, 2])
    out, _ = assert_views_equal_copies(attend, views, causal=causal)

    # The right numbers too, not just the same ones.
    arrays = np.moveaxis(normal((BATCH, SEQLEN, 3, HEADS, HEAD_DIM), dtype, seed=0), 2, 0)
    expected, _ = reference.attention(*arrays, causal=causal)
    assert_close(out.astype(np.float64), expected, BASE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a21_heads_transposed_and_sliced(dtype: str, attend: Attend) -> None:
    fw = attend.framework
    # One projection of width 3·H·D, cut up as many models do, then heads taken in the other order.
    packed = fw.tensor(normal((BATCH, SEQLEN, 3 * HEADS * HEAD_DIM), dtype, seed=0))
    width = HEADS * HEAD_DIM
    views = tuple(
        packed[:, :, i * width : (i + 1) * width].reshape(BATCH, SEQLEN, HEADS, HEAD_DIM)
        for i in range(3)
    )
    assert_views_equal_copies(attend, views)
    # Heads and positions change places: the same memory read as (B, H, S, D).
    transposed = tuple(fw.permute(view, (0, 2, 1, 3)) for view in views)
    assert_views_equal_copies(attend, transposed)


def test_a22_expanded_batch(attend: Attend) -> None:
    fw = attend.framework
    query = normal((2, 96, 2, 64), seed=0)
    key, value = (normal((1, 96, 2, 64), seed=i) for i in (1, 2))
    views = (
        fw.tensor(query),
        fw.broadcast_to(fw.tensor(key), query.shape),
        fw.broadcast_to(fw.tensor(value), query.shape),
    )
    out, _ = assert_views_equal_copies(attend, views)
    expected, _ = reference.attention(
        query, *(np.broadcast_to(x, query.shape) for x in (key, value))
    )
    assert_close(out.astype(np.float64), expected, BASE["float32"])


@pytest.mark.parametrize("axis", range(4), ids=["batch", "seqlen", "heads", "head_dim"])
def test_stride_zero_in_every_axis(axis: int, attend: Attend) -> None:
    fw = attend.framework
    one = tuple(1 if i == axis else n for i, n in enumerate(SHAPE))
    views = tuple(fw.broadcast_to(fw.tensor(normal(one, seed=i)), SHAPE) for i in range(3))
    assert_views_equal_copies(attend, views)


# Views of a larger array, as functions of (tensor of twice the size in every axis).
Cut = Callable[[Any], Any]
BIG = tuple(2 * n for n in SHAPE)
CUTS: dict[str, Cut] = {
    "offset": lambda x: x[1:3, 7:103, 2:5, 33:97],
    "every_second_batch": lambda x: x[::2, :96, :3, :64],
    "every_second_row": lambda x: x[:2, ::2, :3, :64],
    "every_second_head": lambda x: x[:2, :96, ::2, :64],
    "every_second_number": lambda x: x[:2, :96, :3, ::2],
    "odd_numbers": lambda x: x[:2, :96, :3, 1::2],
    "every_second_everything": lambda x: x[1::2, 1::2, 1::2, 1::2],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_offsets(cut: Cut, dtype: str, attend: Attend) -> None:
    fw = attend.framework
    views = tuple(cut(fw.tensor(normal(BIG, dtype, seed=i))) for i in range(3))
    assert views[0].shape == SHAPE
    assert_views_equal_copies(attend, views, causal=True)


@pytest.mark.slow_emulated
def test_each_operand_has_its_own_strides(attend: Attend) -> None:
    fw = attend.framework
    query = fw.permute(fw.tensor(normal((BATCH, HEADS, SEQLEN, HEAD_DIM), seed=0)), BSHD_FROM_BHSD)
    key = fw.tensor(normal((BATCH, SEQLEN, HEADS, 2 * HEAD_DIM), seed=1))[..., ::2]
    value = fw.permute(fw.tensor(normal((HEAD_DIM, HEADS, SEQLEN, BATCH), seed=2)), (3, 2, 1, 0))
    assert_views_equal_copies(attend, (query, key, value))


@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx"], indirect=True)
@pytest.mark.parametrize(
    "axes",
    [(3, 2, 1, 0), (1, 0, 3, 2), (3, 0, 1, 2), (2, 3, 0, 1)],
    ids=lambda axes: "".join(map(str, axes)),
)
def test_axes_in_any_order(axes: tuple[int, ...], attend: Attend) -> None:
    fw = attend.framework
    stored = tuple(SHAPE[axes.index(i)] for i in range(4))
    views = tuple(fw.permute(fw.tensor(normal(stored, seed=i)), axes) for i in range(3))
    assert views[0].shape == SHAPE
    assert_views_equal_copies(attend, views)


@pytest.mark.parametrize("framework", ["numpy", "mlx"], indirect=True)  # the ones that have them
@pytest.mark.parametrize("axis", range(4), ids=["batch", "seqlen", "heads", "head_dim"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_strides(axis: int, dtype: str, attend: Attend) -> None:
    fw = attend.framework
    backwards = (slice(None),) * axis + (slice(None, None, -1),)
    views = tuple(fw.tensor(normal(SHAPE, dtype, seed=i))[backwards] for i in range(3))
    if fw.name == "numpy":
        assert views[0].strides[axis] < 0
    assert_views_equal_copies(attend, views, window_size=(40, 3))


def test_one_query_row_with_negative_and_large_strides(attend_numpy: Attend) -> None:
    memory = normal((4, 600, 3, 128), seed=0)
    query = memory[3::-2, :1, ::-1, ::-2]
    key, value = memory[::-3, ::-2, :, :64], memory[::-3, ::2, ::-1, 64:]
    assert_views_equal_copies(attend_numpy, (query, key, value))


def test_the_same_memory_may_be_all_three(attend: Attend) -> None:
    fw = attend.framework
    array = normal(SHAPE, seed=0)
    tensor = fw.tensor(array)
    shared = attend(tensor, tensor, tensor)
    apart = attend.arrays(array, array.copy(), array.copy())
    assert_same_bits(fw.bits(shared.out), apart.out.view("u4"))


def test_read_only_numpy(attend_numpy: Attend) -> None:
    arrays = tuple(normal(SHAPE, seed=i) for i in range(3))
    expected = attend_numpy(*arrays)
    for array in arrays:
        array.flags.writeable = False
    found = attend_numpy(*arrays)
    assert_same_bits(found.out.view("u4"), expected.out.view("u4"))
    assert found.out.flags.writeable, "the output is the caller's to change"


@pytest.mark.parametrize("slopes", ["heads", "batch_heads"])
def test_strided_alibi_slopes(slopes: str, attend: Attend) -> None:
    fw = attend.framework
    tensors = tuple(fw.tensor(normal(SHAPE, seed=i)) for i in range(3))
    memory = np.abs(normal((2 * BATCH, 2 * HEADS), seed=3))
    if slopes == "heads":
        view, copy = fw.tensor(memory)[0, ::2], np.ascontiguousarray(memory[0, ::2])
    else:
        view, copy = fw.tensor(memory)[::2, 1::2], np.ascontiguousarray(memory[::2, 1::2])
    found = attend(*tensors, alibi_slopes=view)
    expected = attend(*tensors, alibi_slopes=fw.tensor(copy))
    assert_same_bits(fw.bits(found.out), fw.bits(expected.out))


@pytest.mark.cpu_only
def test_torch_views_that_only_flag_a_negation(attend_numpy: Attend) -> None:
    """The imaginary part of a conjugate is stored un-negated, with a bit that says to negate it."""
    torch = array_libraries.load("torch").module
    arrays = [normal(SHAPE, seed=i) for i in range(3)]
    lazy = [torch.complex(torch.zeros(SHAPE), torch.from_numpy(-x)).conj().imag for x in arrays]
    assert all(x.is_neg() for x in lazy)
    found = umfa_numpy(torch, lazy)
    expected = attend_numpy(*arrays)
    assert_same_bits(found.view("u4"), expected.out.view("u4"))


def umfa_numpy(torch: Any, tensors: list[Any]) -> Array:
    out = umfa.flash_attn_func(*tensors)
    assert isinstance(out, torch.Tensor)
    return out.numpy()


@pytest.mark.cpu_only
def test_torch_scalar_batch_strides_are_ignored(attend_numpy: Attend) -> None:
    """An axis of length 1 may carry any stride; it must not be used for anything."""
    torch = array_libraries.load("torch").module
    arrays = [normal((1, 32, 1, 16), seed=i) for i in range(3)]
    odd = [
        torch.as_strided(torch.from_numpy(x), (1, 32, 1, 16), (2**40, 16, 2**41, 1)) for x in arrays
    ]
    found = umfa_numpy(torch, odd)
    assert_same_bits(found.view("u4"), attend_numpy(*arrays).out.view("u4"))
