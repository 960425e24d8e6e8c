"""umfa under torch's modules: `nn.MultiheadAttention` and the encoder layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integrations.calls import FUSED, SDPA, Counted

torch = pytest.importorskip("torch")
F = torch.nn.functional
umfa_torch = pytest.importorskip("umfa.torch")


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    yield
    umfa_torch.disable()
    assert not umfa_torch.is_enabled()


def test_multihead_attention() -> None:
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    stock, _ = module(x, x, x)
    counted = Counted()
    with umfa_torch.sdpa(), torch.no_grad():
        found, weights = module(x, x, x, need_weights=False)
        assert weights is None
        assert counted.taken == {FUSED: 1}
        torch.testing.assert_close(found, stock)
        module(x, x, x)  # fused
    with umfa_torch.sdpa():
        module(x, x, x)  # by matrix products, with gradients
    ((left, calls),) = counted.left.items()
    assert left[0] == FUSED
    assert "need_weights" in left[1]
    assert calls == 2


def encoder() -> Any:
    return torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), 2
    ).eval()


X = torch.linspace(-2, 2, 3 * 6 * 32).sin().view(3, 6, 32)
PADDED = torch.arange(6) >= torch.tensor([6, 4, 1])[:, None]
LATER = torch.ones(6, 6, dtype=torch.bool).triu(1)
CALLS: dict[str, Any] = {
    "layer": lambda model: model.layers[0](X),
    "layer, padded": lambda model: model.layers[0](X, src_key_padding_mask=PADDED),
    "layer, causal": lambda model: model.layers[0](X, src_mask=LATER),
    "layer, a mask for each head": lambda model: model.layers[0](
        X, src_mask=LATER.expand(12, 6, 6)
    ),
    "layer, causal and padded": lambda model: model.layers[0](
        X, src_mask=LATER, src_key_padding_mask=PADDED
    ),
    "layer, nested": lambda model: model.layers[0](nested(5, 0, 3)),
    "encoder": lambda model: model(X),
    "encoder, padded": lambda model: model(X, src_key_padding_mask=PADDED),
    "encoder, nested": lambda model: model(nested(5, 3)),
}


def nested(*lengths: int) -> Any:
    """A strided one."""
    return torch.nested.nested_tensor([X[0, :n] for n in lengths])


def dense(tensor: Any) -> Any:
    return torch.nested.to_padded_tensor(tensor, 0.0) if tensor.is_nested else tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool:UserWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_encoders_in_eval_mode(call: Any) -> None:
    """In all rows, with those that are padding: torch's fused layer calls umfa."""
    model = encoder()
    with torch.inference_mode():
        stock = call(model)
        counted = Counted()
        with umfa_torch.sdpa():
            found = call(model)
    assert set(counted.taken) == {FUSED}
    assert not counted.left
    assert found.is_nested == stock.is_nested
    torch.testing.assert_close(dense(found), dense(stock))


def test_a_float_mask_is_added() -> None:
    """torch's fused layer hides all keys whose mask is not 0, and gives NaN."""
    layer = encoder().layers[0]
    mask = torch.linspace(-1, 1, 36).view(6, 6)
    expected = layer(X, src_mask=mask)  # with gradients: not fused
    with umfa_torch.sdpa(), torch.inference_mode():
        found = layer(X, src_mask=mask)
    torch.testing.assert_close(found, expected.detach())


def test_a_sequence_of_padding_alone_gives_no_nan() -> None:
    """As torch's attention that is not fused; its fused layer gives NaN."""
    layer = encoder().layers[0]
    hidden = torch.tensor([False, True, False])[:, None].expand(3, 6)
    with umfa_torch.sdpa(), torch.inference_mode():
        found = layer(X, src_key_padding_mask=hidden)
    assert found.isfinite().all()


def test_cross_attention_of_the_fused_operation_is_left_to_torch() -> None:
    module = encoder().layers[0].self_attn
    weights = (
        module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias
    )  # fmt: skip
    with torch.inference_mode():
        stock, _ = torch._native_multi_head_attention(X, X + 1, X, 32, 4, *weights, None, False)
        counted = Counted()
        with umfa_torch.sdpa():
            found, _ = torch._native_multi_head_attention(X, X + 1, X, 32, 4, *weights, None, False)
    assert torch.equal(found, stock)
    ((where, reason),) = counted.left
    assert where == FUSED
    assert "not the same tensor" in reason


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_an_encoder_that_is_compiled() -> None:
    model = encoder()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        stock = model(X)
        with umfa_torch.sdpa():
            compiled(X)
            counted = Counted()
            found = compiled(X)
    assert counted.calls == 2
    torch.testing.assert_close(found, stock)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_can_be_scripted() -> None:
    x = torch.randn(2, 9, 32)
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    expected, _ = module(x, x, x)
    with umfa_torch.sdpa():
        found, _ = torch.jit.script(module)(x, x, x)
    torch.testing.assert_close(found, expected)


def test_need_weights_by_position() -> None:
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    counted = Counted()
    with umfa_torch.sdpa(), torch.no_grad():
        module(x, x, x, None, False)
        F.multi_head_attention_forward(
            x, x, x, 32, 4, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, True, None, False,
        )  # fmt: skip
    assert not counted.left
    assert counted.taken == {SDPA: 2}
