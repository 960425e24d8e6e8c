"""torch's autograd through every public function: values, what is saved, what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.cases import normal
from tests.gradients import RELATIVE, compare
from tests.sequences import rotary_tables
from umfa import fa3, fa4

torch: Any = pytest.importorskip("torch", reason="torch is not installed")

# (batch, seqlen, nheads, head_dim)
SHAPES = {"q": (2, 5, 4, 16), "k": (2, 7, 2, 16), "v": (2, 7, 2, 16)}
CU = {"q": torch.tensor([0, 5, 10], dtype=torch.int32), "k": torch.tensor([0, 7, 14])}
COS, SIN = (torch.from_numpy(x) for x in rotary_tables(7, 16))


def leaf(array: Array, dtype: Any = None) -> Any:
    return torch.from_numpy(array).to(dtype or torch.float32).requires_grad_()


def operands(dtype: Any = None, **shapes: tuple[int, ...]) -> dict[str, Any]:
    return {
        name: leaf(normal(shape, seed=i), dtype)
        for i, (name, shape) in enumerate({**SHAPES, **shapes}.items())
    }


def wide(tensor: Any) -> Array:
    """In float64."""
    found: Array = tensor.detach().double().numpy()
    return found


def check(
    given: dict[str, Any], results: Any, expected: Callable[..., reference.Gradients]
) -> None:
    """Compare the leaves' gradients of a random sum over `results`, out or (out, lse), with the
    reference's of the same sum."""
    out, lse = results if isinstance(results, tuple) else (results, None)
    dout = torch.from_numpy(normal(out.shape, seed=20)).to(out.dtype)
    dlse = None if lse is None else torch.from_numpy(normal(lse.shape, seed=21))
    loss = (out * dout).sum() + (0 if lse is None else (lse * dlse).sum())
    loss.backward()
    own = expected(wide(dout), None if dlse is None else wide(dlse))
    names = {"attn_mask": "dmask", "learnable_sink": "dsinks"}
    # Of the coarsest dtype: a float32 gradient depends on an out that has been rounded, too.
    dtypes = {str(x.dtype).removeprefix("torch.") for x in (out, *given.values())}
    tolerance = max(RELATIVE[x] for x in dtypes)
    for name, tensor in given.items():
        if not tensor.requires_grad:
            continue
        assert tensor.grad is not None, name
        assert tensor.grad.dtype is tensor.dtype
        gradient = getattr(own, names.get(name, f"d{name}"))
        compare(name, wide(tensor.grad), gradient, tolerance)


def rows(x: Any) -> Any:
    return x.flatten(0, 1)


def unpacked(x: Any) -> Any:
    return x.unflatten(0, (2, -1)) if not isinstance(x, tuple) else unpacked(x[0])


SAME: dict[str, Any] = {"k": (2, 5, 4, 16), "v": (2, 5, 4, 16)}
CALLS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    # name: (shapes other than SHAPES, call of leaves q, k, v that attends causally)
    "flash_attn_func": ({}, lambda q, k, v: umfa.flash_attn_func(q, k, v, causal=True)),
    "qkvpacked": (
        SAME,
        lambda *x: umfa.flash_attn_qkvpacked_func(torch.stack(x, 2), causal=True),
    ),
    "kvpacked": (
        {},
        lambda q, *x: umfa.flash_attn_kvpacked_func(q, torch.stack(x, 2), causal=True),
    ),
    "varlen": (
        {},
        lambda *x: unpacked(
            umfa.flash_attn_varlen_func(*map(rows, x), CU["q"], CU["k"], 5, 7, causal=True)
        ),
    ),
    "varlen_lists": (
        {},
        lambda *x: unpacked(
            umfa.flash_attn_varlen_func(*map(rows, x), [0, 5, 10], [0, 7, 14], 5, 7, causal=True)
        ),
    ),
    "varlen_qkvpacked": (
        SAME,
        lambda *x: unpacked(
            umfa.flash_attn_varlen_qkvpacked_func(
                torch.stack(x, 2).flatten(0, 1), CU["q"], 5, causal=True
            )
        ),
    ),
    "varlen_kvpacked": (
        {},
        lambda q, *x: unpacked(
            umfa.flash_attn_varlen_kvpacked_func(
                rows(q), torch.stack(x, 2).flatten(0, 1), CU["q"], CU["k"], 5, 7, causal=True
            )
        ),
    ),
    "kvcache_read": (
        {},
        lambda q, k, v: umfa.flash_attn_with_kvcache(q, k, v, cache_seqlens=7, causal=True),
    ),
    "sdpa": (
        SAME,
        lambda *x: umfa.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in x), is_causal=True
        ).transpose(1, 2),
    ),
    "fa3": ({}, lambda *x: fa3.flash_attn_func(*x, causal=True)),
    "fa3_qkvpacked": (
        SAME,
        lambda *x: fa3.flash_attn_qkvpacked_func(torch.stack(x, 2), causal=True),
    ),
    "fa3_varlen": (
        {},
        lambda *x: unpacked(
            fa3.flash_attn_varlen_func(*map(rows, x), CU["q"], CU["k"], 5, 7, causal=True)
        ),
    ),
    "fa4": ({}, lambda *x: fa4.flash_attn_func(*x, causal=True)[0]),
    "fa4_varlen": (
        {},
        lambda *x: unpacked(
            fa4.flash_attn_varlen_func(
                *map(rows, x), cu_seqlens_q=CU["q"], cu_seqlens_k=CU["k"],
                max_seqlen_q=5, max_seqlen_k=7, causal=True,
            )
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    shapes, call = CALLS[name]
    given = operands(**shapes)
    check(
        given,
        call(*given.values()),
        lambda dout, dlse: reference.gradients(*map(wide, given.values()), dout, dlse, causal=True),
    )


def test_rotary_embedding() -> None:
    """The same gradients as through a rotation that torch differentiates."""
    given = operands()
    turn = [
        torch.complex(COS[-x.shape[1] :], SIN[-x.shape[1] :])[None, :, None]
        for x in (given["q"], given["k"])
    ]
    turned = [
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * by).flatten(-2)
        for x, by in zip((given["q"], given["k"]), turn, strict=True)
    ]
    plain = umfa.flash_attn_func(*turned, given["v"], causal=True)
    fused = umfa.fused_rope_attention(*given.values(), COS, SIN, causal=True)
    dout = torch.from_numpy(normal(plain.shape, seed=9))
    for one, other in zip(
        torch.autograd.grad(fused, list(given.values()), dout),
        torch.autograd.grad(plain, list(given.values()), dout),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "mask": {"attn_mask": normal((2, 1, 5, 7), seed=4)},
    "mask for all": {"attn_mask": normal((5, 7), seed=4)},
    "sinks": {"learnable_sink": normal((4,), seed=5)},
    "slopes": {"alibi_slopes": np.linspace(0.1, 0.4, 4, dtype=np.float32)},
    "qv": {"qv": normal((2, 5, 4, 16), seed=6)},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3, "dropout_offset": 1},
    "window": {"window_size": (2, 1), "softcap": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    """Also that the log-sum-exp is differentiable."""
    options = OPTIONS[name]
    arrays = {key: x for key, x in options.items() if isinstance(x, np.ndarray)}
    given = operands() | {key: leaf(x) for key, x in arrays.items()}
    own = {("mask" if key == "attn_mask" else key): x for key, x in options.items()}
    check(
        given,
        umfa.flash_attn_func(**{**options, **given}, return_lse=True),
        lambda dout, dlse: reference.gradients(*(wide(given[x]) for x in "qkv"), dout, dlse, **own),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_exact_as_torch(dtype: Any) -> None:
    """Against float64, the error is at most 3 times that of torch's attention in this dtype."""
    shape = dict.fromkeys("qkv", (1, 96, 2, 32))
    given = operands(dtype, **shape)
    tensors = list(given.values())
    dout = torch.from_numpy(normal(shape["q"], seed=9)).to(dtype)

    def sdpa(*x: Any) -> Any:
        turned = (y.transpose(1, 2) for y in x)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*turned, is_causal=True).transpose(1, 2)

    exact = reference.gradients(*map(wide, tensors), wide(dout), causal=True)[:3]
    own = torch.autograd.grad(umfa.flash_attn_func(*tensors, causal=True), tensors, dout)
    other = torch.autograd.grad(sdpa(*tensors), tensors, dout)
    for name, x, y, z in zip(given, own, other, exact, strict=True):
        error, torchs = (np.abs(wide(found) - z).max() for found in (x, y))
        assert error <= 3 * torchs, f"{name}: {error:.3g}, torch's {torchs:.3g}"


# ---- what is saved -------------------------------------------------------------------------------


def test_what_is_saved() -> None:
    """q, k, v, out and the log-sum-exp; and no copy of what the caller has."""
    saved = []

    def pack(tensor: Any) -> Any:
        saved.append(tensor)
        return tensor

    given = operands()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = umfa.flash_attn_func(*given.values(), causal=True)
    assert [x.shape for x in saved] == [*SHAPES.values(), SHAPES["q"], (2, 4, 5)]
    addresses = [x.data_ptr() for x in (*given.values(), out)]
    assert [x.data_ptr() for x in saved[:4]] == addresses
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        umfa.flash_attn_func(*given.values())
    assert len(saved) == 5


@pytest.mark.parametrize("name", ["q", "attn_mask", "out", "cu_seqlens"])
def test_what_is_saved_must_not_change(name: str) -> None:
    given = {key: x * 1 for key, x in operands().items()} | {"attn_mask": torch.zeros(5, 7)}
    changed = given.get(name)
    if name == "cu_seqlens":
        changed = torch.tensor([0, 5, 10], dtype=torch.int32)
        packed = (rows(given[x]) for x in "qkv")
        out = umfa.flash_attn_varlen_func(*packed, changed, [0, 7, 14], 5, 7)
    else:
        out = umfa.flash_attn_func(**given)
    changed = out if name == "out" else changed
    changed.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_dropout_is_replayed() -> None:
    """The seed drawn in the forward pass counts, not the generator's state in the backward one."""
    given = list(operands().values())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    out = umfa.flash_attn_func(*given, 0.5)
    found = torch.autograd.grad(out.sum(), given)
    torch.set_rng_state(state)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    same = umfa.flash_attn_func(*given, 0.5, dropout_seed=seed)
    assert torch.equal(out, same)
    for one, other in zip(found, torch.autograd.grad(same.sum(), given), strict=True):
        assert torch.equal(one, other)


# The reentrant kind computes without grad mode first, which looks like inference.
@pytest.mark.filterwarnings("ignore:.*dropped at random outside training")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """The forward pass of the recomputation drops the same weights."""
    from torch.utils.checkpoint import checkpoint

    given = list(operands().values())

    def attend(*x: Any) -> Any:
        return umfa.flash_attn_func(*x, 0.3, causal=True)

    found = []
    for call in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=use_reentrant)):
        for x in given:
            x.grad = None
        torch.manual_seed(1)
        call(*given).square().sum().backward()
        found.append([x.grad for x in given])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---- how tensors come and go ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: Any) -> None:
    """Gradients come back in the dtype of the leaf, of a computation in autocast's."""
    given = operands() | {"attn_mask": leaf(normal((5, 7), seed=3))}
    with torch.autocast("cpu", dtype):
        out = umfa.flash_attn_func(**given)
    assert out.dtype is dtype
    out.sum().backward()
    halves = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
    umfa.flash_attn_func(**halves).sum().backward()
    for name, x in given.items():
        assert x.grad.dtype is torch.float32
        assert torch.equal(x.grad, halves[name].grad.float()), name


def test_mixed_dtypes() -> None:
    """Each gradient has the dtype of its tensor."""
    given = operands()
    given["k"] = given["k"].detach().bfloat16().requires_grad_()
    check(
        given,
        umfa.flash_attn_func(*given.values(), out_dtype="float16"),
        lambda dout, dlse: reference.gradients(*map(wide, given.values()), dout, dlse),
    )


def test_strides() -> None:
    """Expanded inputs, and gradients of out that are expanded or transposed."""
    key = leaf(normal((1, 7, 1, 16), seed=1))
    given = operands()
    shared = key.expand(2, 7, 2, 16)

    def gradients(*x: Any, dout: Any) -> Any:
        out = umfa.flash_attn_func(*x)
        return torch.autograd.grad(out, (given["q"], key, given["v"]), dout)

    whole = torch.from_numpy(normal(SHAPES["q"], seed=2))
    turned = whole.transpose(1, 2).contiguous().transpose(1, 2)
    one = torch.ones(1).expand(SHAPES["q"])
    for strided, plain in ((turned, whole), (one, one.contiguous())):
        found = gradients(given["q"], shared, given["v"], dout=strided)
        expected = gradients(given["q"], shared.contiguous(), given["v"], dout=plain)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def test_one_tensor_for_all() -> None:
    x = leaf(normal((1, 6, 2, 16), seed=1))
    umfa.flash_attn_func(x, x, x).sum().backward()
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    umfa.flash_attn_func(*copies).sum().backward()
    torch.testing.assert_close(x.grad, sum(y.grad for y in copies))


@pytest.mark.parametrize("names", ["q", "k v", "attn_mask"])
def test_only_what_is_asked_for(names: str) -> None:
    """Whatever else requires grad, a tensor's gradient has the same bits."""
    given = operands() | {"attn_mask": leaf(normal((5, 7), seed=3))}
    umfa.flash_attn_func(**given).sum().backward()
    few = {key: x.detach().requires_grad_(key in names.split()) for key, x in given.items()}
    umfa.flash_attn_func(**few).sum().backward()
    for key, x in few.items():
        if key in names.split():
            assert torch.equal(x.grad, given[key].grad)
        else:
            assert x.grad is None


def test_the_log_sum_exp_alone() -> None:
    given = operands()
    _, lse = umfa.flash_attn_func(*given.values(), return_lse=True)
    lse.sum().backward()
    shape = SHAPES["q"]
    own = reference.gradients(
        *map(wide, given.values()), np.zeros(shape), np.ones((shape[0], shape[2], shape[1]))
    )
    compare("q", wide(given["q"].grad), own.dq, RELATIVE["float32"])
    compare("k", wide(given["k"].grad), own.dk, RELATIVE["float32"])
    assert not given["v"].grad.any()


def test_weights_have_no_gradient() -> None:
    given = operands()
    out, lse, weights = umfa.flash_attn_func(
        *given.values(), 0.5, dropout_seed=1, return_attn_probs=True
    )
    assert out.requires_grad
    assert lse.requires_grad
    assert not weights.requires_grad
    (out.sum() + lse.sum()).backward()


def test_no_rows() -> None:
    given = operands(q=(2, 0, 4, 16))
    umfa.flash_attn_func(*given.values()).sum().backward()
    for x in given.values():
        assert x.grad.shape == x.shape
        assert not x.grad.any()


# ---- what is refused -----------------------------------------------------------------------------


def cache() -> dict[str, Any]:
    return {name: torch.zeros(2, 9, 2, 16) for name in ("k_cache", "v_cache")}


def refused_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any], str]]:
    """What: (function, arguments, which of them the message names and what it says)."""
    given = operands()
    cos = COS.clone().requires_grad_()
    pages = {"k_cache": torch.zeros(3, 16, 2, 16), "v_cache": torch.zeros(3, 16, 2, 16)}
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    return {
        "append": (
            umfa.flash_attn_with_kvcache,
            {**given, **cache(), "cache_seqlens": 0},
            "k_cache is written in place",
        ),
        "out": (
            umfa.flash_attn_func,
            {**given, "out": torch.zeros(SHAPES["q"])},
            "out is written in place",
        ),
        "pages": (
            umfa.flash_attn_with_kvcache,
            {"q": given["q"], **pages, "cache_seqlens": 7, "block_table": table},
            "block_table",
        ),
        "rotary": (
            umfa.fused_rope_attention,
            {**given, "rotary_cos": cos, "rotary_sin": SIN},
            "rotary_cos requires grad, but",
        ),
    }


@pytest.mark.parametrize("name", refused_calls())
def test_refused(name: str) -> None:
    """At the call, by name, and before anything is written; can_run gives the same reason."""
    function, arguments, text = refused_calls()[name]
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(umfa.UnsupportedError) as caught:
        function(**arguments)
    message = str(caught.value)
    assert text in message
    possible, reason = umfa.can_run(function, **arguments)
    assert not possible
    assert reason.split("] ")[-1] in message
    assert message.startswith("[umfa.")
    assert "; got " in message
    for key, x in before.items():
        assert torch.equal(x, arguments[key]), key
    with torch.no_grad():
        assert umfa.can_run(function, **arguments)[0]
        function(**arguments)


def test_can_run() -> None:
    given = operands()
    assert umfa.can_run(**given) == (True, "")
    assert umfa.can_run(**given, backend="cpu") == (True, "")
    mask = torch.ones(5, 7, dtype=torch.bool)
    assert umfa.can_run(**given, attn_mask=mask) == (True, "")


def test_second_derivatives_are_refused() -> None:
    given = operands()
    loss = umfa.flash_attn_func(*given.values()).square().sum()
    (first,) = torch.autograd.grad(loss, given["q"], create_graph=True)
    with pytest.raises(umfa.UnsupportedError, match=r"flash_attn_func\] the gradient of a grad"):
        first.sum().backward()


def test_a_second_pass_needs_the_graph() -> None:
    given = operands()
    loss = umfa.flash_attn_func(*given.values()).sum()
    loss.backward(retain_graph=True)
    first = given["q"].grad.clone()
    loss.backward()
    assert torch.equal(given["q"].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# PyTorch's own forward mode still compiles its formulas with torch.jit, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_is_refused(requires_grad: bool) -> None:
    given = {key: x.detach().requires_grad_(requires_grad) for key, x in operands().items()}
    with torch.autograd.forward_ad.dual_level():
        given["q"] = torch.autograd.forward_ad.make_dual(given["q"], torch.ones(SHAPES["q"]))
        with pytest.raises(umfa.UnsupportedError, match=r"forward-mode"):
            umfa.flash_attn_func(**given)


# ---- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (*pair, dtype)
        for pair in itertools.combinations(OPTIONS, 2)
        if not all(x.startswith("mask") for x in pair)
        for dtype in DTYPES
    ],
)
def test_pairs_of_options(first: str, second: str, dtype: str) -> None:
    options = OPTIONS[first] | OPTIONS[second]
    kind = getattr(torch, dtype)
    arrays = {key: x for key, x in options.items() if isinstance(x, np.ndarray)}
    given = operands(kind) | {
        key: leaf(x, None if key == "alibi_slopes" else kind) for key, x in arrays.items()
    }
    own = {
        ("mask" if key == "attn_mask" else key): wide(given[key]) if key in given else x
        for key, x in options.items()
    }
    check(
        given,
        umfa.flash_attn_func(**{**options, **given}, causal=True, return_lse=True),
        lambda dout, dlse: reference.gradients(
            *(wide(given[x]) for x in "qkv"), dout, dlse, causal=True, **own
        ),
    )


DISTRIBUTED = """
import multiprocessing, os, sys
import torch, umfa
from torch.nn.parallel import DistributedDataParallel

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x):
        return umfa.flash_attn_qkvpacked_func(self.qkv(x).unflatten(-1, (3, 2, 8)), causal=True)

def gradient(model, x):
    model(x).square().mean().backward()
    return next(model.parameters()).grad

def rank(index, file):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(4, 6, 16)
    alone = gradient(Block(), x)
    torch.manual_seed(0)
    torch.randn(4, 6, 16)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=index, world_size=2
    )
    found = gradient(DistributedDataParallel(Block()), x[2 * index : 2 * index + 2])
    torch.testing.assert_close(found, alone)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank, args=(i, sys.argv[-1])) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Gradients that DistributedDataParallel averages are those of the whole batch."""
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("of", ["out", "lse", "both"])
def test_batches_of_gradients(of: str) -> None:
    """is_grads_batched, as torch's vectorized Jacobians use it."""
    given = list(operands().values())
    out, lse = umfa.flash_attn_func(*given, return_lse=True)
    results = {"out": [out], "lse": [lse], "both": [out, lse]}[of]
    gradients = [torch.from_numpy(normal((3, *x.shape), seed=9)) for x in results]
    asked = given[:2] if of == "lse" else given
    found = torch.autograd.grad(results, asked, gradients, is_grads_batched=True, retain_graph=True)
    alone = [
        torch.autograd.grad(results, asked, list(x), retain_graph=True)
        for x in zip(*gradients, strict=True)
    ]
    for x, y in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(x, torch.stack(y))


def test_batches_of_gradients_have_no_second_derivative() -> None:
    given = list(operands().values())
    out = umfa.flash_attn_func(*given)
    with pytest.raises(umfa.UnsupportedError, match=r"is_grads_batched .* create_graph=True"):
        torch.autograd.grad(
            out, given, torch.ones(3, *out.shape), is_grads_batched=True, create_graph=True
        )


def test_a_call_with_a_mask_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are made anew each time, and are equal."""
    from umfa._call.gradients import Differentiable

    judge, judged = Differentiable.judge, []

    def counting(self: Any, *args: Any) -> Any:
        judged.append(self)
        return judge(self, *args)

    monkeypatch.setattr(Differentiable, "judge", counting)
    q, k, v = torch.randn(3, 1, 2, 6, 8, requires_grad=True)
    for scale in (0.123, 0.456):
        for _ in range(3):
            mask = torch.randn(6, 6)
            out = umfa.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            out.sum().backward()
    assert len(judged) == 2
