"""`umfa.shim.flash_attn`: flash-attn 2's modules, the private names that others call included."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
import umfa.shim
from tests import array_libraries, reference
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close

torch = pytest.importorskip("torch")

NAMES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding",
         "flash_attn.layers", "flash_attn.layers.rotary")  # fmt: skip


@pytest.fixture(autouse=True)
def shim() -> Iterator[umfa.shim.Shim]:
    with umfa.shim.flash_attn() as installed:
        yield installed


def module(name: str = "flash_attn.flash_attn_interface") -> Any:
    return importlib.import_module(name)


def draw(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def wide(*tensors: Any) -> list[Any]:
    return [x.detach().double().numpy() for x in tensors]


# ---- the modules ---------------------------------------------------------------------------------


def test_the_modules_come_and_go(shim: umfa.shim.Shim) -> None:
    for name in NAMES:
        assert importlib.util.find_spec(name) is not None
        assert module(name).__name__ == name
    import flash_attn
    from flash_attn import bert_padding, flash_attn_func
    from flash_attn.layers.rotary import apply_rotary_emb

    assert flash_attn.layers.rotary.apply_rotary_emb is apply_rotary_emb
    assert flash_attn.bert_padding is bert_padding
    assert flash_attn.__version__ >= "2.7"  # as many programs compare it
    assert umfa.shim.flash_attn() is shim
    shim.remove()
    assert not [x for x in sys.modules if x.split(".")[0] == "flash_attn"]
    with pytest.raises(ImportError):
        module()
    assert flash_attn_func(*[draw(1, 4, 2, 8)] * 3).shape == (1, 4, 2, 8)  # what is held, works


def test_a_real_flash_attn_is_not_shadowed(
    shim: umfa.shim.Shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim.remove()
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(umfa.UnsupportedError, match=r"flash_attn can be imported already.*; got /"):
        umfa.shim.flash_attn()
    assert "flash_attn" not in sys.modules


def test_what_asks_for_a_distribution_finds_none() -> None:
    """transformers wants one and CUDA; the documentation says so."""
    utils = pytest.importorskip("transformers.utils.import_utils")
    ask = inspect.unwrap(utils.is_flash_attn_2_available)  # not what its cache says
    assert ask() is False


# ---- public functions ----------------------------------------------------------------------------


def arguments(function: str, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a call in which the first queries see no key."""
    q, k, v = draw(2, 6, 4, 8), draw(2, 3, 4, 8, seed=1), draw(2, 3, 4, 8, seed=2)
    offsets = torch.tensor([0, 6, 12], dtype=torch.int32), torch.tensor([0, 3, 6])
    given: tuple[Any, ...] = (q, k, v)
    if "qkvpacked" in function:
        given = (torch.stack((q, q, q), 2),)
        options["window_size"] = (-3, -3)
    elif "kvpacked" in function:
        given = (q, torch.stack((k, v), 2))
    if "varlen" in function:
        given = tuple(x.flatten(0, 1) for x in given)
        given += (offsets[0], 6) if "qkvpacked" in function else (*offsets, 6, 3)
    return given, options


@pytest.mark.parametrize("library", ["numpy", "jax", "mlx"])
def test_results_of_other_libraries(library: str) -> None:
    """The first of 3 queries sees none of 2 keys."""
    framework = array_libraries.load(library)
    q, k = (framework.tensor(normal(shape, seed=5)) for shape in ((1, 3, 2, 8), (1, 2, 2, 8)))
    function = module("flash_attn").flash_attn_func
    out, lse, weights = function(q, k, k, causal=True, return_attn_probs=True)
    own, own_lse = umfa.flash_attn_func(q, k, k, causal=True, return_lse=True)
    assert np.array_equal(framework.numpy(out), framework.numpy(own))
    expected = framework.numpy(own_lse)
    assert np.isneginf(expected).any()
    assert framework.numpy(lse).dtype == np.float32
    assert np.array_equal(framework.numpy(lse), np.where(np.isneginf(expected), np.inf, expected))
    assert (type(weights), weights.shape, weights.dtype) == (type(out), (0,), out.dtype)


@pytest.mark.parametrize(
    "name", [x for x in umfa.__all__ if "flash_attn" in x and "combine" not in x]
)
def test_public_functions_are_umfas(name: str) -> None:
    function, own = getattr(module("flash_attn"), name), getattr(umfa, name)
    assert function is getattr(module(), name)
    assert inspect.signature(function) == inspect.signature(own)
    assert inspect.getfullargspec(function).args[-1] in inspect.signature(own).parameters
    given, options = arguments(name)
    if "qkvpacked" not in name or "kvpacked" in name.replace("qkvpacked", ""):
        options["causal"] = True
    options.pop("window_size", None)
    before = umfa.stats().taken.get(f"flash_attn.{name}", 0)
    function(*given, **options)
    assert umfa.stats().taken[f"flash_attn.{name}"] == before + 1
    asked = "return_softmax_lse" if "kvcache" in name else "return_attn_probs"
    assert torch.equal(function(*given, **options), own(*given, **options))
    found, expected = (x(*given, **options, **{asked: True}) for x in (function, own))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].masked_fill(expected[1] == -math.inf, math.inf))
    if "qkvpacked" not in name:
        assert torch.isinf(found[1]).any()
    if "kvcache" not in name:
        assert len(found) == 3
        assert found[2].numel() == 0
        dropped = function(*given, dropout_p=0.5, dropout_seed=3, **options, return_attn_probs=True)
        assert (dropped[2] < 0).any()


def test_in_a_graph() -> None:
    function = module("flash_attn").flash_attn_func
    q = draw(1, 8, 2, 16).requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    out, lse, _ = compiled(q, q, q, causal=True, return_attn_probs=True)
    eager = function(q, q, q, causal=True, return_attn_probs=True)
    assert torch.equal(out, eager[0])
    assert torch.equal(lse, eager[1])


# ---- private functions ---------------------------------------------------------------------------

OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (1, 1)},
    {"softcap": 2.0, "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.2])},
]


def positional(options: dict[str, Any], p: float = 0.0) -> list[Any]:
    """As flash-attn's autograd hands them on."""
    window = options.get("window_size", (-1, -1))
    causal, softcap = options.get("causal", False), options.get("softcap", 0.0)
    return [p, 0.3, causal, *window, softcap, options.get("alibi_slopes")]


def expected(q: Any, k: Any, v: Any, options: dict[str, Any], dout: Any = None) -> Any:
    given = {x: y.numpy() if torch.is_tensor(y) else y for x, y in options.items()}
    if dout is None:
        return reference.attention(*wide(q, k, v), softmax_scale=0.3, **given)
    return reference.gradients(*wide(q, k, v), *wide(dout), softmax_scale=0.3, **given)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [(5, 7), (7, 5)], ids=str)
def test_forward_and_backward(options: dict[str, Any], rows: tuple[int, int]) -> None:
    q, k, v = draw(2, rows[0], 4, 8), draw(2, rows[1], 2, 8, seed=1), draw(2, rows[1], 2, 8, seed=2)
    q.requires_grad_()
    out, lse, weights, rng_state = module()._flash_attn_forward(
        q, k, v, *positional(options), False
    )
    assert not out.requires_grad
    assert weights.numel() == 0
    assert (rng_state.dtype, tuple(rng_state.shape)) == (torch.int64, (2,))
    true_out, true_lse = expected(q, k, v, options)
    assert_close(out.numpy(), true_out, BASE["float32"])
    assert_close(lse.numpy(), np.where(np.isinf(true_lse), np.inf, true_lse), LSE)
    dout = draw(*out.shape, seed=5)
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    products = module()._flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, *positional(options), True, rng_state
    )
    true = expected(q, k, v, options, dout)
    for found, wanted in ((dq, true[0]), (dk, true[1]), (dv, true[2])):
        assert_close(found.detach().numpy(), wanted, BASE["float32"])
    assert_close(products.numpy(), np.einsum("bihd,bihd->bhi", *wide(dout, out)), BASE["float32"])
    before = umfa.stats().taken["flash_attn._flash_attn_backward"]
    only = torch.empty_like(k)
    module()._wrapped_flash_attn_backward(
        dout, q, k, v, out, lse, None, only, None, *positional(options), True
    )
    assert torch.equal(only, dk)
    assert umfa.stats().taken["flash_attn._flash_attn_backward"] == before + 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_forward_and_backward(options: dict[str, Any]) -> None:
    lengths = ((3, 4), (5, 2), (0, 3), (2, 6))
    bounds = [
        torch.tensor(np.cumsum([0, *x]), dtype=torch.int32) for x in zip(*lengths, strict=True)
    ]
    q, k, v = draw(10, 4, 8), draw(15, 2, 8, seed=1), draw(15, 2, 8, seed=2)
    tables = (*bounds, 5, 6)
    forward = module()._flash_attn_varlen_forward
    out, lse, _, rng_state = forward(q, k, v, *tables, *positional(options))
    dout = draw(*out.shape, seed=5)
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    module()._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, *tables, *positional(options), False, rng_state
    )
    assert lse.shape == (4, 10)
    for b in range(len(lengths)):
        i, j = (slice(x[b], x[b + 1]) for x in bounds)
        one = [q[None, i], k[None, j], v[None, j]]
        true_out, true_lse = expected(*one, options)
        assert_close(out[None, i].numpy(), true_out, BASE["float32"])
        assert_close(lse[None, :, i].numpy(), np.where(np.isinf(true_lse), np.inf, true_lse), LSE)
        true = expected(*one, options, dout[None, i])
        for found, wanted in ((dq[i], true[0]), (dk[j], true[1]), (dv[j], true[2])):
            assert_close(found[None].numpy(), wanted, BASE["float32"])
    pages = torch.tensor([0, 5, 10, 15, 20])
    paged = forward(
        q, k.view(3, 5, 2, 8), v.view(3, 5, 2, 8), bounds[0], pages, 5, 5,
        *positional(options), block_table=torch.tensor([[0], [2], [1], [1]]),
        seqused_k=torch.tensor([5, 4, 3, 2]),
    )  # fmt: skip
    true_out, _ = expected(q[None, 3:8], k[None, 10:14], v[None, 10:14], options)
    assert_close(paged[0][None, 3:8].numpy(), true_out, BASE["float32"])
    with pytest.raises(umfa.UnsupportedError, match="leftpad_k is not implemented"):
        forward(q, k, v, *tables, *positional(options), leftpad_k=torch.zeros(4))


def test_parts_of_a_ring_add_up() -> None:
    """The backward pass of some keys takes the result and the log-sum-exp over all of them."""
    q, k, v, dout = (draw(1, 6, 2, 8, seed=i) for i in range(4))
    out, lse, _, _ = module()._flash_attn_forward(q, k, v, *positional({}), False)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for keys in (slice(0, 2), slice(2, 6)):
        part = torch.empty_like(q)
        module()._flash_attn_backward(
            dout, q, k[:, keys], v[:, keys], out, lse, part, dk[:, keys], dv[:, keys],
            *positional({}), False,
        )  # fmt: skip
        dq += part
    true = expected(q, k, v, {}, dout)
    for found, wanted in ((dq, true[0]), (dk, true[1]), (dv, true[2])):
        assert_close(found.numpy(), wanted, BASE["float32"])


@pytest.mark.parametrize("varlen", [False, True])
def test_dropout_drops_the_same_weights_backward(varlen: bool) -> None:
    q, k, v, dout = (draw(1, 16, 2, 8, seed=i) for i in range(4))
    tables: tuple[Any, ...] = ()
    if varlen:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        tables = (torch.tensor([0, 16]), torch.tensor([0, 16]), 16, 16)
    kind = "_varlen" if varlen else ""
    forward = getattr(module(), f"_flash_attn{kind}_forward")
    backward = getattr(module(), f"_flash_attn{kind}_backward")
    torch.manual_seed(3)
    out, lse, weights, rng_state = forward(
        q, k, v, *tables, *positional({}, 0.4), return_softmax=True
    )
    again = forward(q, k, v, *tables, *positional({}, 0.4), return_softmax=True)
    assert not torch.equal(out, again[0])
    assert (weights < 0).any()
    assert (weights > 0).any()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    given = (dout, q, k, v, out, lse, dq, dk, dv, *tables, *positional({}, 0.4), False)
    backward(*given, rng_state)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    function = umfa.flash_attn_varlen_func if varlen else umfa.flash_attn_func
    same = function(*own, *tables, 0.4, 0.3, dropout_seed=int(rng_state[0]))
    assert torch.equal(same, out)
    same.backward(dout)
    for found, x in zip((dq, dk, dv), own, strict=True):
        assert torch.equal(found, x.grad)
    with pytest.raises(ValueError, match="rng_state is missing"):
        backward(*given)


def test_dropout_alone_advances_the_generator() -> None:
    q = draw(1, 4, 2, 8)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    module()._flash_attn_forward(q, q, q, *positional({}), False)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- padding -------------------------------------------------------------------------------------


def test_padding_and_back() -> None:
    padding = module("flash_attn.bert_padding")
    x = draw(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    rows, indices, offsets, longest, used = padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert offsets.tolist() == [0, 2, 6, 8]
    assert (offsets.dtype, longest, used.tolist()) == (torch.int32, 4, [2, 4, 2])
    back = padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * mask[:, :, None, None])
    upstream = draw(*back.shape, seed=1)
    back.backward(upstream)
    assert torch.equal(x.grad, upstream * mask[:, :, None, None])
    unused = torch.zeros_like(mask)
    unused[0, 2] = 1
    rows, _, offsets, longest, used = padding.unpad_input(x, mask, unused)
    assert torch.equal(rows, x[(mask + unused).bool()])
    assert (offsets.tolist(), longest, used.tolist()) == ([0, 3, 7, 9], 4, [2, 4, 2])
    for wrong in (mask[:2], mask[:, :4]):
        with pytest.raises(ValueError, match="attention_mask has the wrong shape"):
            padding.unpad_input(x, wrong)


def test_rows_of_several_sequences() -> None:
    padding = module("flash_attn.bert_padding")
    x = draw(2, 6, 4)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0]])
    rows, indices, offsets, longest = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(rows, torch.cat((x[0, :5], x[1, :4])))
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert (offsets.tolist(), longest) == ([0, 2, 5, 6, 7, 9], 3)


def test_rows_and_their_rest() -> None:
    padding = module("flash_attn.bert_padding")
    x = draw(4, 3).requires_grad_()
    rows, rest = padding.index_first_axis_residual(x, torch.tensor([2, 0]))
    assert torch.equal(rows, x[[2, 0]])
    assert torch.equal(rest, x)
    (rows.sum() + 2 * rest.sum()).backward()
    assert x.grad[:, 0].tolist() == [3.0, 2.0, 3.0, 2.0]


# ---- rotary embedding ----------------------------------------------------------------------------


def turned(x: Any, angles: Any, interleaved: bool) -> Any:
    """(rows, heads, channels) as complex numbers, times those of the angles (rows, pairs)."""
    pairs = angles.shape[-1]
    shape = (-1, (pairs, 2) if interleaved else (2, pairs))
    numbers = x[..., : 2 * pairs].double().unflatten(*shape)
    numbers = numbers if interleaved else numbers.transpose(-1, -2)
    factors = torch.polar(torch.ones_like(angles), angles)[..., None, :]
    found = torch.view_as_real(torch.view_as_complex(numbers.contiguous()) * factors)
    found = found if interleaved else found.transpose(-1, -2)
    return torch.cat((found.flatten(-2), x[..., 2 * pairs :].double()), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, [1, 4]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_rotary(interleaved: bool, inplace: bool, offsets: Any, packed: bool) -> None:
    apply = module("flash_attn.layers.rotary").apply_rotary_emb
    angles = draw(10, 3, seed=3).double()
    begin = offsets if isinstance(offsets, list) else [offsets] * 2
    given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    leaf = draw(2, 5, 4, 8).requires_grad_()
    x, options = leaf * 1.0, {}
    if packed:
        x, options = x.flatten(0, 1)[:8], {"cu_seqlens": torch.tensor([0, 5, 8]), "max_seqlen": 5}
    before = x.detach().clone()
    found = apply(x, angles.cos(), angles.sin(), interleaved, inplace, given, **options)
    assert (found is x) == inplace
    rows = [before[:5], before[5:]] if packed else list(before)
    parts = [
        turned(r, angles[b : b + len(r)], interleaved) for r, b in zip(rows, begin, strict=True)
    ]
    true = torch.cat(parts) if packed else torch.stack(parts)
    assert_close(found.detach().numpy(), true.numpy(), BASE["float32"])
    # A rotation keeps lengths: the gradient of half the squares is the input.
    (found.square().sum() / 2).backward()
    assert_close(leaf.grad.flatten(0, 1)[: before.flatten(0, -3).shape[0]].numpy(),
                 before.flatten(0, -3).double().numpy(), BASE["float32"])  # fmt: skip


def test_rotary_refuses() -> None:
    apply = module("flash_attn.layers.rotary").apply_rotary_emb
    x, table = draw(2, 5, 4, 8), torch.ones(6, 4)
    for options, text in (
        ({"seqlen_offsets": 2}, "no such rows; got positions 2 to 6"),
        ({"seqlen_offsets": -1}, "no such rows"),
        ({"seqlen_offsets": torch.tensor([0, 0, 0])}, "seqlen_offsets have the wrong shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens do not fit x"),
    ):
        with pytest.raises(ValueError, match=text):
            apply(x, table, table, **options)
    with pytest.raises(ValueError, match="max_seqlen is too small; got 4"):
        apply(x[0], table, table, cu_seqlens=torch.tensor([0, 5]), max_seqlen=4)
    with pytest.raises(ValueError, match="cos and sin do not fit x"):
        apply(x, torch.ones(6, 5), torch.ones(6, 5))
    with pytest.raises(ValueError, match="x has the wrong shape"):
        apply(x[0], table, table)


# ---- ring-flash-attn -----------------------------------------------------------------------------

RING = """
import sys
import torch
import torch.distributed as dist
import umfa, umfa.shim

umfa.shim.flash_attn()
try:
    # An older transformers has this name, which the release imports with its adapter for them.
    from transformers import modeling_flash_attention_utils as transformers_utils
    transformers_utils.is_flash_attn_greater_or_equal_2_10 = lambda: True
except ImportError:
    sys.modules["ring_flash_attn.adapters"] = torch
    torch.substitute_hf_flash_attn = torch.update_ring_flash_attn_params = None
import ring_flash_attn

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
# float16, as for flash-attn: the release overwrites its own sums of gradients of float32.
whole = [torch.randn(2, 16, 4, 8, generator=generator).half() for _ in range(4)]
limit = {"rtol": 5e-3, "atol": 5e-3}

def check(function, places, **options):
    q, k, v, dout = (x[:, places].clone() for x in whole)
    own = [x.requires_grad_() for x in (q, k, v)]
    out = function(*own, causal=True, **options)
    out.backward(dout)
    given = [x.clone().requires_grad_() for x in whole[:3]]
    true = umfa.flash_attn_func(*given, causal=True)
    true.backward(whole[3])
    torch.testing.assert_close(out, true[:, places], **limit)
    for x, y in zip(own, given):
        # ring_flash_attn_func returns the gradient of query in bfloat16.
        wide = {"rtol": 3e-2, "atol": 3e-2} if "zigzag" not in function.__name__ else limit
        torch.testing.assert_close(x.grad, y.grad[:, places], **wide)

chunks = torch.arange(16).view(4, 4)
check(ring_flash_attn.zigzag_ring_flash_attn_func, torch.cat((chunks[rank], chunks[3 - rank])))
check(ring_flash_attn.ring_flash_attn_func, torch.arange(16).view(2, 8)[rank])

# Packed sequences, each on both ranks.
from ring_flash_attn import zigzag_ring_flash_attn_varlen_func as packed
bounds = torch.tensor([0, 8, 16], dtype=torch.int32)
rows = [x.flatten(0, 1)[:32].clone() for x in whole]
places = torch.cat([start + torch.cat((torch.arange(4) + 4 * rank, torch.arange(4) + 12 - 4 * rank))
                    for start in (0, 16)])
own = [x[places].clone().requires_grad_() for x in rows[:3]]
out = packed(*own, bounds, 8, causal=True)
out.backward(rows[3][places])
given = [x.clone().requires_grad_() for x in rows[:3]]
true = umfa.flash_attn_varlen_func(*given, 2 * bounds, 2 * bounds, 16, 16, causal=True)
true.backward(rows[3])
torch.testing.assert_close(out, true[places], **limit)
for x, y in zip(own, given):
    torch.testing.assert_close(x.grad, y.grad[places], **limit)
print("checked")
dist.destroy_process_group()
"""


def test_ring_flash_attn_on_two_processes(tmp_path: Path) -> None:
    """``pip install --no-deps ring-flash-attn==0.1.8``, which `umfa.shim.flash_attn` lets run."""
    if importlib.util.find_spec("ring_flash_attn") is None:
        pytest.skip("ring-flash-attn is not installed")
    given: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RING]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], **given)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, error = process.communicate(timeout=240)
            assert out.strip() == "checked", error
    finally:
        for process in ranks:
            process.kill()
