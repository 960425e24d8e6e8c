"""`umfa.shim.xformers`: memory_efficient_attention with each of its masks.

The masks are written out here by their definitions, and where xformers is installed (``pip install
--no-deps xformers==0.0.35`` does, for its masks alone) its own are compared, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import umfa
import umfa.shim
from tests import reference
from tests.checks import BASE, LSE, assert_close

torch = pytest.importorskip("torch")
functions = pytest.importorskip("umfa.shim._xformers_attention")
attn_bias = pytest.importorskip("umfa.shim._xformers_bias")

INSTALLED = importlib.util.find_spec("xformers") is not None

Sees = Callable[[int, int, int, int], bool]


def draw(*shape: int, seed: int = 0, dtype: str = "float32", grad: bool = False) -> Any:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    return found.requires_grad_(grad)


def wide(*tensors: Any) -> list[Any]:
    return [x.detach().double().numpy() for x in tensors]


# ---- masks ---------------------------------------------------------------------------------------


def everything(i: int, j: int, rows: int, columns: int) -> bool:
    return True


def causal(i: int, j: int, rows: int, columns: int) -> bool:
    return j <= i


def causal_at_the_end(i: int, j: int, rows: int, columns: int) -> bool:
    return rows - 1 - i <= columns - 1 - j


def local(left: float, right: float, *, end: bool = True) -> Sees:
    """`left` and `right` keys around the query's own."""

    def sees(i: int, j: int, rows: int, columns: int) -> bool:
        own = i + columns - rows if end else i
        return own - left <= j <= own + right

    return sees


class Case(NamedTuple):
    make: Callable[[Any], Any]
    """The mask, from a module like ``attn_bias``."""
    sees: Sees
    """(query, key, queries, keys), of one block."""
    queries: tuple[int, ...]
    """Of each block."""
    keys: tuple[list[int], ...]
    """Where the keys of each block lie."""
    rows: int
    """Of all keys."""
    shape: tuple[int, int] | None = None
    """What materialize asks for, where it is not (queries, keys)."""
    gradients: bool = True

    @property
    def matrix(self) -> Any:
        seen = np.zeros((sum(self.queries), self.rows), bool)
        first = 0
        for count, places in zip(self.queries, self.keys, strict=True):
            for i in range(count):
                for j, place in enumerate(places):
                    seen[first + i, place] = self.sees(i, j, count, len(places))
            first += count
        return np.where(seen, 0.0, -np.inf)


def rows(*bounds: tuple[int, int]) -> tuple[list[int], ...]:
    return tuple(list(range(*x)) for x in bounds)


def dense(make: Callable[[Any], Any], sees: Sees, queries: int = 5, keys: int = 7) -> Case:
    return Case(make, sees, (queries,), rows((0, keys)), keys)


def in_a_row(method: str, sees: Sees, *arguments: int) -> Case:
    def make(m: Any) -> Any:
        mask = m.BlockDiagonalMask.from_seqlens([2, 4, 1], [3, 4, 6])
        return getattr(mask, method)(*arguments) if method else mask

    return Case(make, sees, (2, 4, 1), rows((0, 3), (3, 7), (7, 13)), 13)


PADDED = (2, 3, 1), rows((0, 2), (4, 8), (8, 11)), 12
GAPPY = (2, 3, 1), rows((1, 5), (6, 9), (11, 12)), 14
OVERLAPPING = (2, 3, 1), rows((3, 8), (0, 4), (3, 5)), 14
TABLES = torch.tensor([[4, 1], [0, 5], [3, 2]], dtype=torch.int32)


def pages(*bounds: tuple[int, int]) -> tuple[list[int], ...]:
    """Where rows of each sequence's own pages lie, which have 3 rows."""
    return tuple(
        [int(table[j // 3]) * 3 + j % 3 for j in range(*x)]
        for table, x in zip(TABLES, bounds, strict=True)
    )


IN_PAGES = (2, 3, 1), pages((0, 5), (0, 6), (0, 2)), 18
GAPPY_PAGES = (2, 3, 1), pages((1, 5), (2, 6), (1, 2)), 18


def padded(name: str, sees: Sees, *more: int, local: bool = False) -> Case:
    def make(m: Any) -> Any:
        kind = getattr(m, name)
        return (kind.from_seqlens_local if local else kind.from_seqlens)(
            [2, 3, 1], 4, [2, 4, 3], *more
        )

    return Case(make, sees, *PADDED)


def gappy(name: str, sees: Sees, overlapping: bool = False) -> Case:
    found = OVERLAPPING if overlapping else GAPPY
    starts = [*(x[0] for x in found[1]), 14]
    lengths = [len(x) for x in found[1]]
    return Case(
        lambda m: getattr(m, name).from_seqlens([2, 3, 1], starts, lengths),
        sees, *found, gradients=not overlapping,
    )  # fmt: skip


def in_pages(name: str, sees: Sees) -> Case:
    def make(m: Any) -> Any:
        return getattr(m, name).from_seqlens([2, 3, 1], [5, 6, 2], TABLES, 3)

    return Case(make, sees, *IN_PAGES, shape=(6, 18), gradients=False)


def gappy_in_pages(name: str, sees: Sees) -> Case:
    def make(m: Any) -> Any:
        # Through make_paged: from_seqlens of xformers 0.0.35 raises whatever it is given.
        mask = m.BlockDiagonalGappyKeysMask.from_seqlens([2, 3, 1], [1, 8, 13, 18], [4, 4, 1])
        return mask.make_paged(TABLES, 3, 6, getattr(m, name))

    return Case(make, sees, *GAPPY_PAGES, shape=(6, 18), gradients=False)


CASES = {
    "LowerTriangular": dense(lambda m: m.LowerTriangularMask(), causal),
    "LowerTriangular, tall": dense(lambda m: m.LowerTriangularMask(), causal, 7, 5),
    "FromBottomRight": dense(lambda m: m.LowerTriangularFromBottomRightMask(), causal_at_the_end),
    "FromBottomRight, tall": dense(
        lambda m: m.LowerTriangularFromBottomRightMask(), causal_at_the_end, 7, 5
    ),
    "FromBottomRightLocal": dense(
        lambda m: m.LowerTriangularFromBottomRightMask().make_local_attention(3), local(2, 0)
    ),
    "Local": dense(lambda m: m.LocalAttentionFromBottomRightMask(1, 2), local(1, 2)),
    "Local, 0 to 0": dense(lambda m: m.LocalAttentionFromBottomRightMask(0, 0), local(0, 0)),
    "BlockDiagonal": in_a_row("", everything),
    "BlockDiagonalCausal": in_a_row("make_causal", causal),
    "BlockDiagonalCausalFromBottomRight": in_a_row(
        "make_causal_from_bottomright", causal_at_the_end
    ),
    "BlockDiagonalCausalLocal": in_a_row("make_local_attention", local(1, 0, end=False), 2),
    "BlockDiagonalCausalLocalFromBottomRight": in_a_row(
        "make_local_attention_from_bottomright", local(1, 0), 2
    ),
    "PaddedKeys": padded("BlockDiagonalPaddedKeysMask", everything),
    "CausalWithOffsetPaddedKeys": padded(
        "BlockDiagonalCausalWithOffsetPaddedKeysMask", causal_at_the_end
    ),
    "LocalPaddedKeys": padded(
        "BlockDiagonalLocalAttentionPaddedKeysMask", local(1, 1), 1, 1, local=True
    ),
    "CausalLocalPaddedKeys": padded(
        "BlockDiagonalCausalLocalAttentionPaddedKeysMask", local(1, 0), 2, local=True
    ),
    "GappyKeys": gappy("BlockDiagonalGappyKeysMask", everything),
    "CausalWithOffsetGappyKeys": gappy(
        "BlockDiagonalCausalWithOffsetGappyKeysMask", causal_at_the_end
    ),
    "GappyKeys, overlapping": gappy("BlockDiagonalGappyKeysMask", everything, True),
    "CausalWithOffsetGappyKeys, overlapping": gappy(
        "BlockDiagonalCausalWithOffsetGappyKeysMask", causal_at_the_end, True
    ),
    "PagedPaddedKeys": in_pages("PagedBlockDiagonalPaddedKeysMask", everything),
    "PagedCausalWithOffsetPaddedKeys": in_pages(
        "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask", causal_at_the_end
    ),
    "PagedGappyKeys": gappy_in_pages("PagedBlockDiagonalGappyKeysMask", everything),
    "PagedCausalWithOffsetGappyKeys": gappy_in_pages(
        "PagedBlockDiagonalCausalWithOffsetGappyKeysMask", causal_at_the_end
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_materialize(case: Case) -> None:
    shape = case.shape or case.matrix.shape
    for leading, dtype in (((), torch.float32), ((2, 3), torch.bfloat16)):
        mask = case.make(attn_bias)
        found = mask.to("cpu").materialize((*leading, *shape), dtype)
        assert found.dtype == dtype
        assert np.array_equal(
            found.float().numpy(), np.broadcast_to(case.matrix, (*leading, *case.matrix.shape))
        )


def test_materialize_is_that_of_xformers(case: Case) -> None:
    if not INSTALLED:
        pytest.skip("xformers is not installed")
    theirs = importlib.import_module("xformers.ops.fmha.attn_bias")
    shape = case.shape or case.matrix.shape
    ours, expected = (case.make(x).materialize(shape) for x in (attn_bias, theirs))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_and_gradients(case: Case, dtype: str) -> None:
    q = draw(1, sum(case.queries), 4, 8, seed=1, dtype=dtype, grad=case.gradients)
    k, v = (draw(1, case.rows, 4, 8, seed=i, dtype=dtype, grad=case.gradients) for i in (2, 3))
    mask = case.make(attn_bias)
    given = {"mask": case.matrix, "softmax_scale": 0.4}
    true_out, true_lse = reference.attention(*wide(q, k, v), **given)
    out = functions.memory_efficient_attention(q, k, v, mask, scale=0.4)
    assert_close(out.detach().double().numpy(), true_out, BASE[dtype])
    again, lse = functions.memory_efficient_attention_forward_requires_grad(q, k, v, mask, 0, 0.4)
    assert (again.requires_grad, lse.requires_grad) == (False, False)
    assert torch.equal(again, out)
    assert_close(lse.numpy(), true_lse, LSE)
    assert torch.equal(functions.memory_efficient_attention_forward(q, k, v, mask, scale=0.4), out)
    if case.gradients:
        dout = draw(*out.shape, seed=5, dtype=dtype)
        out.backward(dout)
        true = reference.gradients(*wide(q, k, v), *wide(dout), **given, given_out=wide(out)[0])
        for x, expected in zip((q, k, v), true, strict=False):
            assert_close(x.grad.double().numpy(), expected, BASE[dtype], "gradient")


@pytest.mark.parametrize("name", [x for x in CASES if not CASES[x].gradients])
def test_what_has_no_gradients_raises(name: str) -> None:
    case = CASES[name]
    q = draw(1, sum(case.queries), 4, 8, grad=True)
    k, mask = draw(1, case.rows, 4, 8), case.make(attn_bias)
    with pytest.raises(umfa.UnsupportedError):
        functions.memory_efficient_attention(q, k, k, mask).sum().backward()


def test_a_table_that_was_changed_counts() -> None:
    """Programs write new lengths into the tensors between calls."""
    mask = CASES["CausalWithOffsetPaddedKeys"].make(attn_bias)
    q, k = draw(1, 6, 2, 8), draw(1, 12, 2, 8, seed=1)
    mask.k_seqinfo.seqlen.copy_(torch.tensor([3, 3, 4]))
    other = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [2, 3, 1], 4, [3, 3, 4]
    )
    found, expected = (functions.memory_efficient_attention(q, k, k, x) for x in (mask, other))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("bmk", "tensor"),
        ("bmhk", "tensor"),
        ("bmghk", "tensor"),
        ("bmhk", "causal and tensor"),  # which xformers has with 4 dimensions only
    ],
)
def test_tensors_as_masks(layout: str, kind: str) -> None:
    inner = {"bmk": (), "bmhk": (4,), "bmghk": (2, 2)}[layout]
    q, k = draw(2, 5, *inner, 8, grad=True), draw(2, 7, *inner, 8, seed=1, grad=True)
    v = draw(2, 7, *inner, 6, seed=2, grad=True)
    numbers = draw(2, *inner, 5, 7, seed=3, grad=True)
    mask, options = numbers, {}
    if kind != "tensor":
        if layout != "bmhk":
            return  # xformers has this one with 4 dimensions only
        mask, options = (
            attn_bias.LowerTriangularMask().add_bias(numbers),
            {"alignment": "upper_left"},
        )
        whole = numbers + torch.full((5, 7), -math.inf).triu(1)
        assert torch.equal(mask.to("cpu").materialize((2, 4, 5, 7)), whole)
    out = functions.memory_efficient_attention(q, k, v, mask)
    assert out.shape == (*q.shape[:-1], 6)
    flat = [x.reshape(2, x.shape[1], -1, x.shape[-1]) for x in (q, k, v)]
    given = {"mask": wide(numbers.reshape(2, -1, 5, 7))[0], "causal": kind != "tensor", **options}
    true, _ = reference.attention(*wide(*flat), **given)
    assert_close(out.detach().numpy(), true.reshape(out.shape), BASE["float32"])
    dout = draw(*out.shape, seed=5)
    out.backward(dout)
    true = reference.gradients(*wide(*flat, dout.reshape(2, 5, -1, 6)), **given)
    found = q, k, v, numbers
    for x, expected in zip(found, (*true[:3], true[4]), strict=True):
        assert_close(x.grad.numpy(), expected.reshape(x.shape), BASE["float32"], "gradient")


@pytest.mark.parametrize("packed", [False, True])
def test_heads_that_share_keys(packed: bool) -> None:
    """The heads of a group, to which key and value were expanded."""
    q = draw(1, 6, 2, 3, 8, grad=True)
    k, v = (draw(1, 6, 2, 1, 8, seed=i, grad=True) for i in (1, 2))
    mask = attn_bias.BlockDiagonalMask.from_seqlens([2, 4]) if packed else None
    many = [x.expand(1, 6, 2, 3, 8) for x in (k, v)]
    out = functions.memory_efficient_attention(q, *many, mask)
    given = {} if mask is None else {"mask": mask.materialize((6, 6)).numpy()}
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    true, true_lse = reference.attention(*wide(*flat), **given)
    assert_close(out.detach().numpy(), true.reshape(out.shape), BASE["float32"])
    dout = draw(*out.shape, seed=5)
    out.backward(dout)
    gradients = reference.gradients(*wide(*flat, dout.flatten(2, 3)), **given)
    for x, expected in zip((q, k, v), gradients, strict=False):
        assert_close(x.grad.numpy(), expected.reshape(x.shape), BASE["float32"], "gradient")
    copied = functions.memory_efficient_attention(q, *(x.contiguous() for x in many), mask)
    assert_close(copied.detach().numpy(), true.reshape(out.shape), BASE["float32"])
    _, lse = functions.memory_efficient_attention_forward_requires_grad(q, *many, mask)
    assert_close(lse.numpy(), true_lse.reshape(1, 2, 3, 6), LSE)


def test_dropout_and_dtype() -> None:
    q = draw(1, 16, 2, 8)
    torch.manual_seed(1)
    found = functions.memory_efficient_attention(
        q.requires_grad_(), q, q, p=0.5, output_dtype=torch.bfloat16
    )
    torch.manual_seed(1)
    assert torch.equal(found, umfa.flash_attn_func(q, q, q, 0.5, out_dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, functions.memory_efficient_attention(q, q, q).bfloat16())
    name = "xformers.ops.memory_efficient_attention"
    before = umfa.stats().taken[name]
    functions.memory_efficient_attention(q, q, q)
    assert umfa.stats().taken[name] == before + 1
    with pytest.raises(NotImplementedError, match=r"no dropout; got p=0\.5"):
        functions.memory_efficient_attention_forward_requires_grad(q, q, q, p=0.5)
    paged = CASES["PagedGappyKeys"].make(attn_bias)
    k = draw(1, 18, 2, 8)
    with pytest.raises(umfa.UnsupportedError, match="dropout is not implemented for this mask"):
        functions.memory_efficient_attention_forward(draw(1, 6, 2, 8), k, k, paged, 0.5)
    half = functions.memory_efficient_attention_forward(
        draw(1, 6, 2, 8), k, k, paged, output_dtype=torch.float16
    )
    assert half.dtype == torch.float16


# ---- sequences in a list -------------------------------------------------------------------------


def test_lists_of_tensors() -> None:
    given = [draw(2, 3, 2, 8), draw(1, 5, 2, 8, seed=1)]
    mask, whole = attn_bias.BlockDiagonalMask.from_tensor_list(given)
    assert whole.shape == (1, 11, 2, 8)
    for x, y in zip(mask.split(whole), given, strict=True):
        assert torch.equal(x, y)
    out = mask.split(functions.memory_efficient_attention(whole, whole, whole, mask))
    for x, y in zip(out, given, strict=True):
        assert_close(x.numpy(), umfa.flash_attn_func(y, y, y).double().numpy(), BASE["float32"])
    keys = [draw(2, 4, 2, 8, seed=2), draw(1, 6, 2, 8, seed=3)]
    mask, q, k, v = attn_bias.BlockDiagonalMask.from_tensor_lists_qkv(given, keys, keys)
    out = mask.split_queries(functions.memory_efficient_attention(q, k, v, mask))
    for x, y, z in zip(out, given, keys, strict=True):
        assert_close(x.numpy(), umfa.flash_attn_func(y, z, z).double().numpy(), BASE["float32"])
    for x, y in zip(mask.split_kv(k), keys, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="lengths of their own"):
        mask.split(q)
    with pytest.raises(ValueError, match="the lists do not fit"):
        attn_bias.BlockDiagonalMask.from_tensor_lists_qkv(given, keys[::-1])
    with pytest.raises(ValueError, match="the tensor to split has the wrong shape"):
        mask.split_queries(k)


# ---- refusals ------------------------------------------------------------------------------------


def test_masks_refuse_what_they_cannot_be() -> None:
    m = attn_bias
    for make, text in (
        (lambda: m.LocalAttentionFromBottomRightMask(-1, 0), "window_left is no length; got -1"),
        (lambda: m.LowerTriangularFromBottomRightMask().make_local_attention(0), "window_size"),
        (lambda: m.BlockDiagonalMask.from_seqlens([2, 3], [2]), "not as many sequences"),
        (lambda: m.BlockDiagonalMask.from_seqlens([2, -3]), "no lengths"),
        (lambda: m.BlockDiagonalMask.from_seqlens(torch.tensor([2])), "are a tensor"),
        (
            lambda: m.BlockDiagonalMask.from_seqlens([3], [2]).make_causal_from_bottomright(),
            "block 0 has more queries than keys",
        ),
        (lambda: m.BlockDiagonalPaddedKeysMask.from_seqlens([1], 4, [5]), "longer than padding"),
        (lambda: m.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [5]), "do not fit"),
        (lambda: m.BlockDiagonalMask.from_seqlens([2]).materialize((3, 2)), "the shape is not"),
        (lambda: m._GappySeqInfo.from_seqlens([1]), "starts are missing"),
        (lambda: m._PaddedSeqLenInfo.from_seqlens([1]), "padding is missing"),
    ):
        with pytest.raises(ValueError, match=rf"^\[umfa\.shim\.xformers\] .*{text}"):
            make()
    with pytest.raises(
        TypeError, match=r"^\[umfa\.shim\.xformers\] seqlens is not an integer; got 1.5"
    ):
        m.BlockDiagonalMask.from_seqlens([1.5, 2])


def test_attention_refuses() -> None:
    attend = functions.memory_efficient_attention
    q = draw(1, 5, 4, 8)
    for given, text in (
        ((q, q[0], q), "wrong shapes"),
        ((q[0, 0], q[0, 0], q[0, 0]), "wrong shapes"),
        ((q, q[:, :, :2], q[:, :, :2]), "do not fit"),
        ((q, q, q[:, :4]), "do not fit"),
        ((q, q[..., :4], q), "do not fit"),
        ((q, q, q, draw(5, 5)), "attn_bias has the wrong shape"),
        ((q, q, q, attn_bias.BlockDiagonalMask.from_seqlens([2])), "query does not fit attn_bias"),
        (
            (q, q[:, :4], q[:, :4], attn_bias.BlockDiagonalMask.from_seqlens([5])),
            "key does not fit attn_bias",
        ),
        (
            (q[:, :1], q, q, attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
                [1], [2], torch.tensor([[0]]), 2)),
            "keys are no whole pages",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^\[umfa\.shim\.xformers\] .*{text}"):
            attend(*given)
    with pytest.raises(TypeError, match="attn_bias is none; got str"):
        attend(q, q, q, "causal")
    with pytest.raises(TypeError, match=r"added to scores; got torch\.bool"):
        attend(q, q, q, torch.ones(1, 4, 5, 5, dtype=torch.bool))


# ---- the modules ---------------------------------------------------------------------------------


def test_the_modules_come_and_go() -> None:
    if INSTALLED:
        with pytest.raises(umfa.UnsupportedError, match="xformers can be imported already"):
            umfa.shim.xformers()
        return
    with umfa.shim.xformers() as shim:
        assert umfa.shim.xformers() is shim
        ops = importlib.import_module("xformers.ops")
        fmha = importlib.import_module("xformers.ops.fmha")
        masks = importlib.import_module("xformers.ops.fmha.attn_bias")
        assert ops.fmha is fmha
        assert fmha.attn_bias is masks
        assert ops.memory_efficient_attention is functions.memory_efficient_attention
        assert fmha.BlockDiagonalMask is masks.BlockDiagonalMask is attn_bias.BlockDiagonalMask
        assert ops.LowerTriangularMask is masks.LowerTriangularMask
        q = draw(1, 4, 3, 2, 8)
        out = ops.memory_efficient_attention(*ops.unbind(q, 2), attn_bias=ops.LowerTriangularMask())
        options = {"causal": True, "causal_alignment": "top_left"}
        assert torch.equal(out, umfa.flash_attn_func(*q.unbind(2), **options))
        assert importlib.import_module("xformers").__version__
    assert not [x for x in sys.modules if x.split(".")[0] == "xformers"]


def test_a_real_xformers_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xformers.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(umfa.UnsupportedError, match="xformers can be imported already"):
        umfa.shim.xformers()
    assert "xformers" not in sys.modules or INSTALLED
