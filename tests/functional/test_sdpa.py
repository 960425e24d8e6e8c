"""scaled_dot_product_attention beside PyTorch's: shapes, masks, and where they lie in memory."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import umfa
from tests import array_libraries, reference
from tests.array_libraries import DTYPES, Array, Framework
from tests.cases import normal
from tests.checks import BASE, Tolerance, assert_close, assert_same_bits
from tests.signatures import DROPOUT, by_keyword, by_position
from tests.tiers import crossed

if TYPE_CHECKING:
    from tests.attend import Attend

Shape = tuple[int, ...]


class Shapes(NamedTuple):
    query: Shape
    key: Shape
    value: Shape
    mask: Shape | None = None
    enable_gqa: bool = False

    def __str__(self) -> str:
        parts = ["x".join(map(str, shape)) for shape in self[:3]]
        if self.mask is not None:
            parts.append("mask" + "x".join(map(str, self.mask)))
        return "-".join([*parts, *(["gqa"] if self.enable_gqa else [])])


# Of every rank, with what broadcasts.
BATCHES = [
    Shapes((9, 8), (11, 8), (11, 3)),
    Shapes((9, 8), (11, 8), (11, 3), (9, 11)),
    Shapes((9, 8), (11, 8), (11, 3), (1, 11)),
    Shapes((4, 9, 8), (4, 11, 8), (4, 11, 3)),
    Shapes((4, 9, 8), (4, 11, 8), (4, 11, 3), (4, 1, 11)),
    Shapes((4, 9, 8), (4, 11, 8), (4, 11, 3), (9, 11)),
    Shapes((4, 9, 8), (1, 11, 8), (1, 11, 3)),
    Shapes((4, 9, 8), (11, 8), (4, 11, 3)),
    Shapes((9, 8), (4, 11, 8), (4, 11, 3)),
    Shapes((2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, 8), (2, 4, 9, 11)),
    Shapes((2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, 8), (2, 1, 1, 11)),
    Shapes((2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, 8), (4, 9, 1)),
    Shapes((2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, 8), (1,)),
    Shapes((2, 4, 9, 8), (1, 4, 11, 8), (2, 1, 11, 8), (1, 4, 1, 11)),
    Shapes((1, 1, 9, 8), (2, 4, 11, 8), (2, 4, 11, 8)),
    Shapes((2, 4, 9, 8), (4, 11, 8), (1, 11, 8)),
    Shapes((2, 8, 9, 8), (2, 2, 11, 8), (2, 2, 11, 3), (2, 8, 9, 11), enable_gqa=True),
    Shapes((2, 8, 9, 8), (2, 1, 11, 8), (2, 1, 11, 3), (2, 1, 1, 11), enable_gqa=True),
    Shapes((1, 8, 9, 8), (3, 4, 11, 8), (3, 4, 11, 8), enable_gqa=True),
    Shapes((2, 8, 9, 8), (2, 4, 11, 8), (2, 1, 11, 8), enable_gqa=True),
    Shapes((8, 9, 8), (2, 11, 8), (2, 11, 8), (8, 1, 11), enable_gqa=True),
    Shapes((3, 2, 4, 9, 8), (3, 2, 4, 11, 8), (3, 2, 4, 11, 8)),
    Shapes((3, 2, 4, 9, 8), (3, 2, 4, 11, 8), (3, 2, 4, 11, 8), (2, 1, 9, 11)),
    Shapes((3, 2, 4, 9, 8), (3, 2, 4, 11, 8), (3, 2, 4, 11, 8), (3, 1, 4, 1, 11)),
    Shapes((3, 2, 4, 9, 8), (3, 1, 4, 11, 8), (1, 2, 4, 11, 8), (3, 2, 1, 9, 11)),
    Shapes((3, 1, 4, 9, 8), (2, 4, 11, 8), (3, 2, 1, 11, 8)),
    Shapes((3, 2, 8, 9, 8), (1, 2, 2, 11, 8), (1, 2, 2, 11, 8), (2, 8, 9, 1), enable_gqa=True),
    Shapes((2, 1, 3, 4, 9, 8), (2, 2, 1, 4, 11, 8), (1, 2, 3, 4, 11, 8), (2, 1, 1, 1, 1, 11)),
    Shapes((2, 3, 1, 2, 2, 2, 9, 8), (2, 1, 2, 1, 2, 2, 11, 8), (1, 2, 1, 2, 1, 11, 8)),
]


def tensors(shapes: Shapes, dtype: str = "float32", mask: str = "float32") -> list[Any]:
    """Query, key, value and mask as arrays."""
    arrays: list[Any] = [normal(shape, dtype, seed=i) for i, shape in enumerate(shapes[:3])]
    if shapes.mask is None:
        return [*arrays, None]
    numbers = normal(shapes.mask, "float32" if mask == "bool" else mask, seed=3)
    return [*arrays, np.asarray(numbers > -0.5) if mask == "bool" else numbers]


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        pytest.param(shapes, kind, id=f"{shapes}-{kind}")
        for shapes in BATCHES
        for kind in (("bool", "float32") if shapes.mask is not None else ("",))
    ],
)
def test_sdpa_batch_dimensions(shapes: Shapes, kind: str, attend: Attend) -> None:
    options = {"enable_gqa": True} if shapes.enable_gqa else {}
    attend.sdpa_case(*tensors(shapes, mask=kind), **options)


def torch_attention(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """PyTorch's own, by its plain ("math") path."""
    torch = array_libraries.load("torch").module
    attention = torch.nn.attention
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **options)


# In float32; what PyTorch's own rounding adds is of the same size.
TOLERANCE = {
    "float32": Tolerance(4e-5, 2e-5),
    "float16": Tolerance(3e-3, 3e-3),
    "bfloat16": Tolerance(2e-2, 2e-2),
}


def beside_torch() -> Iterator[Any]:
    """Each shape in each dtype, with each mask that PyTorch takes there, or causal and not."""
    for shapes in BATCHES:
        for dtype in DTYPES:
            kinds = {"bool", dtype, "float32"} if shapes.mask is not None else {"", "causal"}
            for kind in sorted(kinds):
                yield pytest.param(shapes, dtype, kind, id=f"{shapes}-{dtype}-{kind or 'plain'}")


@pytest.mark.parametrize("framework", ["torch"], indirect=True)
@pytest.mark.parametrize(("shapes", "dtype", "kind"), list(beside_torch()))
def test_sdpa_against_torch(shapes: Shapes, dtype: str, kind: str, attend: Attend) -> None:
    """Shape and numbers are PyTorch's, whatever broadcasts."""
    make = attend.framework.tensor
    arrays = tensors(shapes, dtype, kind)
    query, key, value, mask = (None if x is None else make(x) for x in arrays)
    options = {"is_causal": kind == "causal", "enable_gqa": shapes.enable_gqa}
    theirs = torch_attention(query, key, value, mask, **options)
    ours = attend.sdpa(query, key, value, mask, **options)
    assert ours.shape == tuple(theirs.shape)
    assert_close(ours, attend.framework.float64(theirs), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "kind"),
    crossed(
        [*DTYPES, *list(DTYPES)[1:]],
        ["bool", "float32", "float16", "bfloat16", "float32"],
        mark=pytest.mark.slow_emulated,
    ),
)
def test_every_dtype_of_mask_beside_every_dtype(dtype: str, kind: str, attend: Attend) -> None:
    shapes = Shapes((2, 4, 40, 64), (2, 4, 70, 64), (2, 4, 70, 64), (2, 1, 40, 70))
    attend.sdpa_case(*tensors(shapes, dtype, kind))


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_one_query_beside_a_mask(kind: str, attend: Attend) -> None:
    """What generation asks for; the Metal backend has kernels of its own for it."""
    for mask in [(2, 1, 1, 300), (300,), (2, 8, 1, 300)]:
        shapes = Shapes((2, 8, 1, 64), (2, 2, 300, 64), (2, 2, 300, 64), mask, enable_gqa=True)
        attend.sdpa_case(*tensors(shapes, mask=kind), enable_gqa=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 1e-3])
def test_scale_comes_before_the_mask(scale: float, attend_numpy: Attend) -> None:
    shapes = Shapes((1, 2, 40, 64), (1, 2, 50, 64), (1, 2, 50, 64), (40, 50))
    attend_numpy.sdpa_case(*tensors(shapes), scale=scale)


@pytest.mark.parametrize("lowest", ["float32", "float16", "bfloat16"])
def test_the_lowest_number_hides_a_key(lowest: str, attend_numpy: Attend) -> None:
    """torch.finfo(dtype).min is what many models write for -inf."""
    query, key, value = (normal((1, 2, 40, 32), lowest, seed=i) for i in range(3))
    shown = np.arange(40) < 10
    number = float(np.finfo(np.float32 if lowest == "float32" else np.float16).min)
    mask = np.where(shown, 0, number).astype(DTYPES[lowest])
    out = attend_numpy.sdpa_arrays(query, key, value, mask)
    expected = reference.scaled_dot_product(query, key, value, shown)
    assert_close(out, expected, BASE[lowest])


def test_a_mask_of_true_or_zero_changes_little(attend_numpy: Attend) -> None:
    arrays = [normal((1, 2, 70, 32), seed=i) for i in range(3)]
    plain = attend_numpy.sdpa_arrays(*arrays)
    for mask in (np.ones((70, 70), bool), np.zeros((70, 70), np.float32)):
        found = attend_numpy.sdpa_arrays(*arrays, mask)
        assert_close(found, plain, Tolerance(1e-6, 1e-6))


def test_it_is_flash_attention_with_other_axes(attend: Attend) -> None:
    arrays = [normal((2, 40, 4, 32), seed=i) for i in range(3)]
    bhsd = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in arrays]
    out = attend.sdpa_arrays(*bhsd).astype(np.float32)
    expected = attend.arrays(*arrays).out
    assert_same_bits(out.transpose(0, 2, 1, 3).copy().view("u4"), expected.view("u4"))


EMPTY = [
    Shapes((2, 3, 0, 8), (2, 3, 6, 8), (2, 3, 6, 5), (2, 1, 0, 6)),
    Shapes((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 5), (2, 1, 4, 0)),
    Shapes((0, 3, 4, 8), (0, 3, 6, 8), (0, 3, 6, 5), (4, 6)),
    Shapes((0, 3, 4, 8), (1, 3, 6, 8), (1, 3, 6, 5)),
    Shapes((2, 0, 4, 8), (2, 0, 6, 8), (2, 0, 6, 5)),
    Shapes((2, 0, 3, 4, 8), (1, 1, 3, 6, 8), (2, 1, 3, 6, 5), (2, 1, 1, 1, 6)),
    Shapes((0, 8), (6, 8), (6, 5)),
    Shapes((4, 8), (0, 8), (0, 5)),
    Shapes((2, 3, 4, 2, 8), (2, 1, 4, 0, 8), (1, 3, 4, 0, 5)),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("shapes", EMPTY, ids=str)
def test_empty_tensors(shapes: Shapes, attend: Attend) -> None:
    """Without keys the answer is 0."""
    if attend.backend.startswith("metal-"):
        pytest.skip("nothing reaches a kernel that test_no_keys does not bring")
    attend.sdpa_case(*tensors(shapes))


# ---- where masks lie in memory -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx"], indirect=True)
def test_masks_of_any_strides(kind: str, attend: Attend) -> None:
    fw = attend.framework
    shapes = Shapes((2, 3, 33, 16), (2, 3, 50, 16), (2, 3, 50, 16), (4, 6, 66, 100))
    query, key, value, big = tensors(shapes, mask=kind)
    inputs = [fw.tensor(x) for x in (query, key, value)]
    memory = fw.tensor(big)
    views = {
        "steps": memory[::2, 1::2, ::2, 1::2],
        "offset": memory[1:3, 2:5, 7:40, 11:61],
        "transposed": fw.permute(fw.tensor(np.ascontiguousarray(big.T)), (3, 2, 1, 0))[
            :2, :3, :33, :50
        ],
        "expanded": fw.broadcast_to(memory[:1, :1, :1, :50], (2, 3, 33, 50)),
    }
    for name, view in views.items():
        copy = fw.tensor(np.ascontiguousarray(fw.numpy(view)))
        found, expected = attend.sdpa(*inputs, view), attend.sdpa(*inputs, copy)
        np.testing.assert_array_equal(found, expected, name)


def test_a_mask_of_negative_strides(attend_numpy: Attend) -> None:
    arrays = [normal((2, 3, 40, 16), seed=i) for i in range(3)]
    mask = normal((2, 3, 40, 40), seed=3)
    found = attend_numpy.sdpa_arrays(*arrays, mask[::-1, ::-1, ::-1, ::-1])
    mask = np.ascontiguousarray(mask[::-1, ::-1, ::-1, ::-1])
    np.testing.assert_array_equal(found, attend_numpy.sdpa_arrays(*arrays, mask))


@pytest.mark.sanitize
@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
@pytest.mark.parametrize("axes", [(1, 0, 2, 3, 4), (2, 0, 1, 4, 3), (0, 2, 1, 3, 4)], ids=str)
def test_batch_dimensions_that_no_stride_joins(axes: Shape, attend: Attend) -> None:
    """They are carried out one after another; the same bits come out as of a copy."""
    if attend.backend.startswith("metal-"):
        pytest.skip("the planner makes one plan; the core splits the call")
    fw = attend.framework
    shape = (3, 2, 4, 20, 16)
    stored = tuple(shape[axes.index(i)] for i in range(5))
    views = [fw.permute(fw.tensor(normal(stored, seed=i)), axes) for i in range(3)]
    assert tuple(views[0].shape) != stored or axes == tuple(range(5))
    mask = fw.permute(fw.tensor(normal((2, 3, 1, 1, views[1].shape[-2]), seed=3)), (1, 0, 2, 3, 4))
    if tuple(views[0].shape[:2]) != (3, 2):
        mask = mask[:1, :1]
    copies = [fw.tensor(np.ascontiguousarray(fw.numpy(x))) for x in (*views, mask)]
    np.testing.assert_array_equal(attend.sdpa(*views, mask), attend.sdpa(*copies))


def test_a_result_past_64_bits_is_refused() -> None:
    """Expanded tensors are small themselves."""
    one = np.ones((1, 1, 1, 1, 1, 1), np.float32)
    long = 2**21
    query = np.broadcast_to(one, (long, 1, long, 1, 1, 1))
    key = np.broadcast_to(one, (1, long, 1, long, 1, 1))
    possible, reason = umfa.can_run(umfa.scaled_dot_product_attention, query, key, one)
    assert not possible
    assert "the result is too large" in reason
    with pytest.raises(ValueError, match="the result is too large; got query"):
        umfa.scaled_dot_product_attention(query, key, one)


@pytest.mark.parametrize(
    ("ndim", "text"),
    [
        (1, "has 1 dimensions; got shape (1,); expected 2 to 8: (..., nheads, seqlen, head_dim)"),
        (9, "has an impossible number of dimensions; got 9; expected at most 8"),
    ],
)
def test_2_to_8_dimensions(ndim: int, text: str) -> None:
    for index, name in enumerate(("query", "key", "value")):
        tensors: list[Any] = [np.ones((1, 1), np.float32)] * 3
        umfa.scaled_dot_product_attention(*tensors)
        tensors[index] = np.ones((1,) * ndim, np.float32)
        with pytest.raises(ValueError, match=re.escape(f"] {name} {text}")):
            umfa.scaled_dot_product_attention(*tensors)


def test_an_output_in_pieces_is_one_call() -> None:
    """Also by the counters: however many problems the core makes of it."""
    query = normal((2, 3, 4, 5, 8), seed=0)
    key = normal((3, 2, 4, 5, 8), seed=1).swapaxes(0, 1)
    before = umfa.stats().cpu_calls
    umfa.scaled_dot_product_attention(query, key, key, backend="cpu")
    assert umfa.stats().cpu_calls == before + 1


# ---- the interface -------------------------------------------------------------------------------


def test_signature_is_that_of_torch() -> None:
    """PyTorch's has none to inspect; its documentation says this."""
    function = umfa.scaled_dot_product_attention
    tail = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    tensors = dict.fromkeys(["query", "key", "value"], inspect.Parameter.empty)
    assert list(by_position(function).items()) == list((tensors | tail).items())
    assert by_keyword(function) == [
        "scale", "enable_gqa", "backend", *DROPOUT, "out", "out_dtype", "batch_invariant",
    ]  # fmt: skip
    assert inspect.signature(function).parameters["enable_gqa"].default is False
    assert inspect.signature(function).parameters["scale"].default is None


def test_can_run_judges_the_same_call(framework: Framework) -> None:
    query = framework.tensor(normal((2, 4, 6, 8), seed=0))
    key = framework.tensor(normal((2, 2, 6, 8), seed=1))
    mask = framework.tensor(np.ones((2, 1, 1, 6), bool))
    attention = umfa.scaled_dot_product_attention
    assert umfa.can_run(attention, query, key, key, enable_gqa=True) == (True, "")
    assert umfa.can_run(attention, query, key, key, mask, enable_gqa=True) == (True, "")
    possible, reason = umfa.can_run(attention, query, key, key)
    assert not possible
    assert reason.startswith("[umfa.can_run] nheads differs")
    possible, reason = umfa.can_run(attention, query, query, query, dropout_p=1.5)
    assert not possible
    assert "dropout_p is out of range; got 1.5" in reason


# ---- whatever shape ------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    """Shapes that broadcast, a mask of any kind or none, and views of permuted memory."""
    ndim = draw(st.integers(2, 6))
    batch = [draw(st.integers(1, 3)) for _ in range(max(0, ndim - 3))]
    heads_k = draw(st.integers(1, 3))
    gqa = ndim >= 3 and draw(st.booleans())
    heads = heads_k * draw(st.integers(1, 3)) if gqa else heads_k
    seqlen_q, seqlen_k = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    head_dim, head_dim_v = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(list(DTYPES)))

    def broadcast(full: Shape, keep: int) -> Shape:
        """Some of all but the last `keep` dimensions are 1, or are not there."""
        first = len(full) - keep
        shape = [1 if i < first and draw(st.integers(0, 3)) == 0 else n for i, n in enumerate(full)]
        missing = draw(st.integers(0, first)) if draw(st.integers(0, 4)) == 0 else 0
        return tuple(shape[missing:])

    def somewhere(shape: Shape, make: Any) -> Array:
        order = draw(st.permutations(range(len(shape))))
        memory = np.asarray(make(tuple(shape[i] for i in order)))
        return np.transpose(memory, np.argsort(order))

    def numbers(kind: str, seed: int) -> Any:
        return lambda shape: normal(shape, kind, seed=seed)

    batches = (*batch, heads_k) if ndim >= 3 else ()
    keep = 3 if gqa else 2
    query_shape = (*batch, heads, seqlen_q, head_dim) if ndim >= 3 else (seqlen_q, head_dim)
    arrays: list[Any] = [somewhere(broadcast(query_shape, keep), numbers(dtype, 0))]
    for seed, dim in ((1, head_dim), (2, head_dim_v)):
        shape = broadcast((*batches, seqlen_k, dim), keep)
        arrays.append(somewhere(shape, numbers(dtype, seed)))

    options: dict[str, Any] = {"enable_gqa": True} if gqa else {}
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-0.5, 0.5))
    out = reference.flattened(*arrays, None, enable_gqa=gqa).shape
    kind = draw(st.sampled_from(["", "causal", "bool", "float32", dtype]))
    if kind in ("", "causal"):
        options["is_causal"] = kind == "causal"
        return [*arrays, None], options
    full = (*out[:-1], seqlen_k)
    shape = tuple(1 if draw(st.integers(0, 2)) == 0 else n for n in full)
    shape = shape[draw(st.integers(0, len(shape))) :]
    seed = draw(st.integers(4, 2**32 - 1))
    if kind == "bool":
        mask = somewhere(shape, lambda s: np.random.default_rng(seed).random(s) < 0.7)
    else:
        mask = somewhere(shape, numbers(kind, seed))
    return [*arrays, mask], options


PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow_emulated
@settings(PROFILE)
@given(problem=problems())
def test_any_problem(problem: tuple[list[Any], dict[str, Any]], attend_numpy: Attend) -> None:
    arrays, options = problem
    found = attend_numpy.sdpa(*arrays, **options)
    expected = reference.scaled_dot_product(*arrays, **options)
    assert_close(found, expected, BASE[str(arrays[0].dtype)])
