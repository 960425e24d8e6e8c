"""umfa under torch's own attention: `umfa.torch.enable` and what it reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import umfa
from tests import reference
from tests.checks import BASE, assert_close
from tests.integrations.calls import INNER, SDPA, Counted, tensors

torch = pytest.importorskip("torch")
F = torch.nn.functional
umfa_torch = pytest.importorskip("umfa.torch")


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    yield
    umfa_torch.disable()
    assert not umfa_torch.is_enabled()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": torch.ones(40, 40, dtype=torch.bool).tril(3)},
    "float mask": {"attn_mask": torch.linspace(-2, 1, 1600).view(40, 40)},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_torch_gets_umfa_s_bits(options: dict[str, Any], dtype: str) -> None:
    q, k, v = tensors(2, 3, 40, 16, dtype=getattr(torch, dtype))
    counted = Counted()
    with umfa_torch.sdpa():
        found = F.scaled_dot_product_attention(q, k, v, **options)
    assert counted.taken == {SDPA: 1}
    assert torch.equal(found, umfa.scaled_dot_product_attention(q, k, v, **options))
    mask = options.get("attn_mask")
    expected, _ = reference.attention(
        *(x.transpose(1, 2).float().numpy() for x in (q, k, v)),
        causal=options.get("is_causal", False),
        alignment="upper_left",
        softmax_scale=options.get("scale"),
        mask=None if mask is None else mask.numpy(),
    )
    assert_close(found.transpose(1, 2).double().numpy(), expected, BASE[dtype])


def test_gradients() -> None:
    given = tensors(1, 2, 30, 16, grad=True)
    stock = torch.autograd.grad(F.scaled_dot_product_attention(*given).square().sum(), given)
    counted = Counted()
    with umfa_torch.sdpa():
        found = torch.autograd.grad(F.scaled_dot_product_attention(*given).square().sum(), given)
    assert counted.calls == 2, "forward and backward"
    for x, y in zip(found, stock, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def in_inference_mode(*given: Any) -> Any:
    with torch.inference_mode():
        return F.scaled_dot_product_attention(*given)


def without_gradients(*given: Any) -> Any:
    with torch.no_grad():
        return F.scaled_dot_product_attention(*given)


@pytest.mark.parametrize("call", [in_inference_mode, without_gradients])
def test_without_autograd(call: Callable[..., Any]) -> None:
    given = tensors(1, 2, 20, 16)
    counted = Counted()
    with umfa_torch.sdpa():
        out = call(*given)
    assert counted.taken == {SDPA: 1}
    assert torch.equal(out, umfa.scaled_dot_product_attention(*given))


def test_autocast() -> None:
    given = tensors(1, 2, 20, 16)
    counted = Counted()
    with umfa_torch.sdpa(), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(*given)
    assert out.dtype is torch.bfloat16
    assert counted.taken == {SDPA: 1}
    assert torch.equal(out, umfa.scaled_dot_product_attention(*(x.bfloat16() for x in given)))


def doubled(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compile(compiler: str, grad: bool) -> None:
    given = tensors(1, 2, 24, 16, grad=grad)
    torch._dynamo.reset()
    stock = doubled(*given)
    with umfa_torch.sdpa():
        compiled = torch.compile(doubled, backend=compiler, fullgraph=True)
        compiled(*given)
        counted = Counted()
        out = compiled(*given)
        if grad:
            gradients = torch.autograd.grad(out.sum(), given)
    assert counted.calls == 1 + grad
    torch.testing.assert_close(out, stock)
    if grad:
        for x, y in zip(gradients, torch.autograd.grad(stock.sum(), given), strict=True):
            torch.testing.assert_close(x, y)


class Attends(torch.nn.Module):  # type: ignore[misc]
    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return doubled(q, k, v)


def test_export_keeps_torch_s_operation() -> None:
    """So that the program runs where umfa is not, and on umfa where it is enabled."""
    given = tuple(tensors(1, 2, 24, 16))
    with umfa_torch.sdpa():
        program = torch.export.export(Attends(), given)
        counted = Counted()
        out = program.module()(*given)
        assert counted.taken == {SDPA: 1}
        assert torch.equal(out, 2 * umfa.scaled_dot_product_attention(*given, is_causal=True))
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.aten.scaled_dot_product_attention.default in targets
    counted = Counted()
    program.module()(*given)
    assert counted.calls == 0


def test_torch_func() -> None:
    q, k, v = tensors(1, 2, 24, 16)

    def loss(q: Any) -> Any:
        return doubled(q, k, v).sum()

    stock = torch.func.grad(loss)(q)
    counted = Counted()
    with umfa_torch.sdpa():
        found = torch.func.grad(loss)(q)
    assert counted.taken == {INNER: 1, f"{INNER}_backward": 1}
    torch.testing.assert_close(found, stock)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap() -> None:
    q, k, v = tensors(3, 2, 24, 16)
    counted = Counted()
    with umfa_torch.sdpa():
        found = torch.vmap(lambda *x: doubled(*(y[None] for y in x)))(q, k, v)
    assert counted.taken == {INNER: 3}
    torch.testing.assert_close(found[:, 0], doubled(q, k, v))
    counted = Counted()
    with umfa_torch.sdpa():  # three dimensions, for which torch itself multiplies matrices
        torch.vmap(doubled)(q, k, v)
    (((where, reason), calls),) = counted.left.items()
    assert (where, calls) == (SDPA, 1)
    assert "matrix products" in reason


def test_what_umfa_refuses_runs_on_torch_and_is_counted() -> None:
    given = tensors(1, 2, 24, 16, dtype=torch.float64)
    stock = F.scaled_dot_product_attention(*given)
    counted = Counted()
    with umfa_torch.sdpa():
        assert torch.equal(F.scaled_dot_product_attention(*given), stock)
    assert counted.calls == 0
    ((where, reason),) = counted.left
    assert where == SDPA
    assert "float64" in reason
    assert not reason.startswith("[")
    assert reason in str(umfa.stats())


def test_errors_are_torch_s_own() -> None:
    q, k, v = tensors(1, 2, 24, 16)
    with pytest.raises(RuntimeError) as stock:
        F.scaled_dot_product_attention(q, k[..., :8], v)
    with umfa_torch.sdpa(), pytest.raises(RuntimeError) as found:
        F.scaled_dot_product_attention(q, k[..., :8], v)
    assert str(found.value) == str(stock.value)


def test_a_fault_of_umfa_s_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("a bug")

    monkeypatch.setattr("umfa.torch._overrides.scaled_dot_product_attention", broken)
    with umfa_torch.sdpa(), pytest.raises(TypeError, match="a bug"):
        F.scaled_dot_product_attention(*tensors(1, 2, 24, 16))


def test_matrix_products_on_request_are_torch_s() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = tensors(1, 2, 24, 16, grad=True)
    counted = Counted()
    with umfa_torch.sdpa(), sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v)
    assert not counted.taken
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), k)[0].abs().sum() > 0


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_graphs_with_torch_s_operation_take_umfa_s_results(grad: bool) -> None:
    """inductor asserts strides: compiled before umfa is enabled, and run after."""
    torch._dynamo.reset()
    for given in (
        tensors(1, 2, 24, 16, grad=grad),
        [x.transpose(1, 2).detach().requires_grad_(grad) for x in tensors(1, 24, 2, 16)],
    ):
        compiled = torch.compile(doubled, backend="inductor")
        expected = compiled(*given)
        with umfa_torch.sdpa():
            found = compiled(*given)
            gradients = torch.autograd.grad(found.sum(), given) if grad else ()
        torch.testing.assert_close(found, expected)
        stock = torch.autograd.grad(expected.sum(), given) if grad else ()
        for x, y in zip(gradients, stock, strict=True):
            torch.testing.assert_close(x, y)


def jagged(*lengths: int, heads: int = 2, grad: bool = False) -> Any:
    rows = [torch.randn(n, heads, 8) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=grad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_nested_tensors(is_causal: bool) -> None:
    """Each sequence as if it were alone. torch itself refuses causal ones on a CPU."""
    leaves = [jagged(5, 3, 8, grad=True) for _ in range(3)]
    counted = Counted()
    with umfa_torch.sdpa():
        found = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in leaves), is_causal=is_causal
        )
    assert counted.taken == {f"{SDPA} of nested tensors": 1}
    assert found.shape == leaves[0].transpose(1, 2).shape, "the ragged length too"
    alone = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in parts), is_causal=is_causal
        )
        for parts in zip(*(x.unbind() for x in leaves), strict=True)
    ]
    expected = torch.cat([x[0].transpose(0, 1) for x in alone])
    found = found.transpose(1, 2).values()
    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(found.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.values(), y.values(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_with_heads_that_do_not_fit() -> None:
    q = jagged(5, 3, heads=4).transpose(1, 2)
    k = jagged(5, 3).transpose(1, 2)
    counted = Counted()
    with umfa_torch.sdpa(), pytest.raises((RuntimeError, ValueError)):
        F.scaled_dot_product_attention(q, k, k)
    assert counted.calls == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_strided_nested_tensors_are_left_to_torch(grad: bool) -> None:
    rows = [torch.randn(2, n, 8) for n in (5, 3)]
    given = torch.nested.nested_tensor(rows, requires_grad=grad)
    stock = F.scaled_dot_product_attention(given, given, given)
    counted = Counted()
    with umfa_torch.sdpa(), torch.set_grad_enabled(grad):
        found = F.scaled_dot_product_attention(given, given, given)
    for x, y in zip(found.unbind(), stock.unbind(), strict=True):
        assert torch.equal(x, y)
    ((where, reason),) = counted.left
    assert where == SDPA
    assert "nested tensor" in reason


@pytest.mark.parametrize("shape", [(1, 2, 6, 8), (6, 8)], ids=str)
def test_batches_of_gradients(shape: tuple[int, ...]) -> None:
    """is_grads_batched, as torch's Jacobians use it."""
    given = tensors(*shape, grad=True)
    gradients = torch.randn(3, *shape)

    def run(**options: Any) -> Any:
        out = F.scaled_dot_product_attention(*given)
        return torch.autograd.grad(out, given, gradients, is_grads_batched=True, **options)

    stock = run()
    counted = Counted()
    with umfa_torch.sdpa():
        found = run()
        with pytest.raises(umfa.UnsupportedError, match="create_graph=True"):
            run(create_graph=True)
    assert counted.taken == {SDPA: 2}
    for x, y in zip(found, stock, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_inner_operation_called_directly(requires_grad: bool) -> None:
    """Also of tensors whose gradients torch computes from its two results, and under autocast."""
    given = tensors(1, 2, 24, 16, grad=requires_grad)
    inner = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def run() -> list[Any]:
        out, lse = inner(*given, is_causal=True)
        found = torch.autograd.grad(out.square().sum(), given) if requires_grad else ()
        return [out, lse, *found]

    stock = run()
    counted = Counted()
    with umfa_torch.sdpa(), torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert counted.calls == 1 + requires_grad
    for x, y in zip(found, stock, strict=True):
        assert x.stride() == y.stride()
        torch.testing.assert_close(x, y)


FOR_MPS = "aten::_scaled_dot_product_attention_math_for_mps"


def test_the_operation_of_mps() -> None:
    """Called at the key MPS with tensors on the CPU: nothing runs on a GPU here."""
    q, k, v = tensors(1, 4, 24, 16)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)
    with umfa_torch.sdpa():
        kernel = torch.library.get_kernel(FOR_MPS, "MPS")
        counted = Counted()
        out, weights = kernel.call_boxed(
            keys, q, k[:, :2], v[:, :2], None, 0.0, True, scale=0.3, enable_gqa=True
        )
        assert counted.taken == {"torch." + FOR_MPS.removeprefix("aten::"): 1}
        expected = umfa.scaled_dot_product_attention(
            q, k[:, :2], v[:, :2], is_causal=True, scale=0.3, enable_gqa=True
        )
        assert torch.equal(out, expected)
        assert weights.numel() == 0
        with pytest.raises(NotImplementedError, match="'MPS' backend"):  # torch's, which is absent
            kernel.call_boxed(keys, q, k, v, None, 0.1, False, torch.ones(24, 24))
    ((_, reason),) = counted.left
    assert "dropout_mask" in reason
    with pytest.raises(NotImplementedError, match="'MPS' backend"):
        kernel.call_boxed(keys, q, k, v)
    assert torch.library.get_kernel("aten::scaled_dot_product_attention", "AutogradMPS")


@pytest.mark.parametrize("enabled", [False, True])
def test_other_devices_are_passed_on(enabled: bool) -> None:
    """In inference mode umfa's kernel is asked for every device."""
    umfa_torch.enable()
    if not enabled:
        umfa_torch.disable()
    q = torch.empty(1, 2, 24, 16, device="meta")
    counted = Counted()
    with torch.inference_mode():
        out = F.scaled_dot_product_attention(q, q, q[..., :8], is_causal=True)
    assert out.device == q.device
    assert out.shape == (1, 2, 24, 8)
    assert not counted.taken
    assert not counted.left
