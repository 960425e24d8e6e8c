"""`umfa.diffusers.enable`: models of diffusers with random weights, beside stock attention."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

import umfa

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
adapter = pytest.importorskip("umfa.diffusers")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

DISPATCHED = "diffusers.dispatch_attention_fn"
SDPA = "torch.scaled_dot_product_attention"


def draw(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux() -> tuple[Any, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": draw(1, 16, 4), "encoder_hidden_states": draw(1, 6, 32),
        "pooled_projections": draw(1, 32), "timestep": torch.tensor([1.0]),
        "img_ids": draw(16, 3), "txt_ids": draw(6, 3),
    }  # fmt: skip


def flux2() -> tuple[Any, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    return model, {
        "hidden_states": draw(1, 16, 4), "encoder_hidden_states": draw(1, 6, 32),
        "timestep": torch.tensor([1.0]), "guidance": torch.tensor([1.0]),
        "img_ids": draw(16, 4), "txt_ids": draw(6, 4),
    }  # fmt: skip


def sd3() -> tuple[Any, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return model, {
        "hidden_states": draw(1, 4, 8, 8), "encoder_hidden_states": draw(1, 6, 32),
        "pooled_projections": draw(1, 64), "timestep": torch.tensor([1.0]),
    }  # fmt: skip


def unet() -> tuple[Any, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    return model, {
        "sample": draw(1, 4, 16, 16), "timestep": 1, "encoder_hidden_states": draw(1, 6, 32),
    }  # fmt: skip


def vae() -> tuple[Any, dict[str, Any]]:
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, sample_size=16,
    )  # fmt: skip
    return model, {"sample": draw(1, 3, 16, 16)}


def wan() -> tuple[Any, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": draw(1, 4, 2, 8, 8), "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.tensor([1]),
    }  # fmt: skip


def padded() -> Any:
    """Text of two lengths."""
    there = torch.ones(2, 7, dtype=torch.bool)
    there[0, 5:] = False
    return there


def qwen_image() -> tuple[Any, dict[str, Any]]:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": draw(2, 16, 16), "encoder_hidden_states": draw(2, 7, 16),
        "encoder_hidden_states_mask": padded(), "timestep": torch.ones(2),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }  # fmt: skip


def pixart() -> tuple[Any, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, out_channels=8,
        sample_size=8, patch_size=2, norm_num_groups=1, cross_attention_dim=16,
        caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": draw(2, 4, 8, 8), "encoder_hidden_states": draw(2, 7, 16),
        "encoder_attention_mask": padded(), "timestep": torch.tensor([1, 1]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


CALLS = {
    flux: (DISPATCHED, 3),
    flux2: (DISPATCHED, 3),
    wan: (DISPATCHED, 4),
    qwen_image: (DISPATCHED, 2),
    sd3: (SDPA, 2),
    pixart: (SDPA, 4),
    unet: (SDPA, 8),
    vae: (SDPA, 2),
}


@pytest.fixture(autouse=True)
def _torch_afterwards() -> Iterator[None]:
    torch.manual_seed(0)
    # set_attention_backend() also changes the default of all models.
    registry = diffusers.models.attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield
    registry._active_backend = active
    umfa.torch.disable()
    assert not umfa.torch.is_enabled()


def run(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_a_model_gives_what_it_gave(make: Any) -> None:
    model, inputs = make()
    model.eval()
    where, calls = CALLS[make]
    stock = run(model, inputs)
    (found,) = report = adapter.enable(model)
    assert (found.by_umfa, found.by_torch) == ((calls, 0) if where == DISPATCHED else (0, calls))
    assert not found.others
    assert type(model).__name__ in str(report)
    before = umfa.stats()
    ours = run(model, inputs)
    after = umfa.stats()
    assert Counter(after.taken) - Counter(before.taken) == {where: calls}
    assert after.left == before.left
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    adapter.disable(model)
    assert torch.equal(run(model, inputs), stock)
    assert umfa.stats().taken == after.taken


def test_gradients() -> None:
    model, inputs = flux()

    def gradients() -> list[Any]:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    stock = gradients()
    adapter.enable(model)
    for x, y in zip(gradients(), stock, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_a_pipeline_and_the_backends_that_it_had() -> None:
    model, _ = flux()
    decoder, _ = vae()
    model.set_attention_backend("native")

    class Pipeline:
        def __init__(self) -> None:
            self.components = {"transformer": model, "vae": decoder, "scheduler": object()}

    report = adapter.enable(Pipeline())
    assert [x.name for x in report] == ["transformer", "vae"]
    assert str(report).count("\n") == 1
    adapter.enable(Pipeline())  # twice is once
    adapter.disable(Pipeline())
    backends = {processor._attention_backend for processor in model.attn_processors.values()}
    assert backends == {"native"}
    model.set_attention_backend("umfa")  # known now by name, too


def test_a_copy_gets_the_backends_that_the_model_had() -> None:
    model, _ = flux()
    model.set_attention_backend("native")
    adapter.enable(model)
    copies = deepcopy(model), pickle.loads(pickle.dumps(model))
    adapter.disable(model)
    for copy in (model, *copies):
        processors = copy.attn_processors.values()
        if copy is not model:
            assert {x._attention_backend for x in processors} == {"umfa"}
        adapter.disable(copy)
        assert {x._attention_backend for x in processors} == {"native"}
        assert not any("umfa" in name for x in processors for name in vars(x))


def test_models_hold_torch_s_attention_for_themselves() -> None:
    (first, _), (second, _) = vae(), vae()
    adapter.disable(first)  # was never enabled
    umfa.torch.enable()
    adapter.disable(first)
    assert umfa.torch.is_enabled(), "by the program itself"
    adapter.enable(first)
    adapter.disable(first)
    assert umfa.torch.is_enabled(), "by the program itself"
    umfa.torch.disable()
    for model in (first, second, second):
        adapter.enable(model)
    adapter.disable(first)
    adapter.disable(first)
    assert umfa.torch.is_enabled(), "for the second model"
    adapter.disable(second)
    assert not umfa.torch.is_enabled()


def test_processors_that_compute_attention_themselves_are_named() -> None:
    model, _ = vae()
    processor = diffusers.models.attention_processor.AttnProcessor()
    model.set_attn_processor(processor)
    (found,) = adapter.enable(model)
    assert found.others == {"AttnProcessor": 2}
    assert "2 not by umfa (AttnProcessor)" in str(found)


@pytest.mark.parametrize("pipe", [None, [], 7], ids=str)
def test_what_has_no_models_is_refused_before_anything_changes(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"^\[umfa\.diffusers\] pipe has no models; got"):
        adapter.enable(pipe)
    assert not umfa.torch.is_enabled()


@pytest.mark.parametrize("dtype", ["bool", "float"])
def test_masks_of_keys(dtype: str) -> None:
    q, k = draw(2, 5, 2, 8), draw(2, 7, 2, 8)
    there = torch.ones(2, 7, dtype=torch.bool)
    there[0, 5:] = False
    mask = there if dtype == "bool" else torch.where(there, 0.0, float("-inf"))
    found = adapter._attention(q, k, k, mask)
    expected = umfa.flash_attn_func(q, k, k, attn_mask=there[:, None, None, :])
    assert torch.equal(found, expected)


def test_what_is_refused() -> None:
    q, k = draw(1, 5, 4, 8), draw(1, 5, 2, 8)
    with pytest.raises(ValueError, match="enable_gqa"):
        adapter._attention(q, k, k)
    assert adapter._attention(q, k, k, enable_gqa=True).shape == q.shape
    with pytest.raises(umfa.UnsupportedError, match="context parallelism"):
        adapter._attention(q, q, q, _parallel_config=object())
    _, lse = adapter._attention(q, q, q, return_lse=True)
    assert lse.shape == (1, 4, 5)


def test_a_graph_counts_when_it_is_traced() -> None:
    def function(q: Any) -> Any:
        return adapter._attention(q, q, q) + 1

    q = draw(1, 8, 2, 16)
    before = umfa.stats()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(q), umfa.flash_attn_func(q, q, q) + 1)
    assert Counter(umfa.stats().taken) - Counter(before.taken) == {DISPATCHED: 1}


# ---- rotary embedding in the kernel ----------------------------------------------------------


@pytest.fixture
def rotated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the backend, whether it got the tables."""
    seen = []
    for name in ("flash_attn_func", "fused_rope_attention"):
        function = getattr(adapter, name)

        def call(
            *arguments: Any, function: Any = function, name: str = name, **options: Any
        ) -> Any:
            seen.append(name == "fused_rope_attention")
            return function(*arguments, **options)

        monkeypatch.setattr(adapter, name, call)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [flux, flux2], ids=lambda make: make.__name__)
def test_rotary_embedding_by_the_kernel(make: Any, dtype: str, rotated: list[bool]) -> None:
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model, inputs = make()
    finally:
        torch.set_default_dtype(torch.float32)
    positions = ("img_ids", "txt_ids")
    inputs = {k: x if k in positions else x.to(model.dtype) for k, x in inputs.items()}
    model.eval()
    kinds = [type(processor) for processor in model.attn_processors.values()]
    stock = run(model, inputs)
    adapter.enable(model)
    apart = run(model, inputs)
    assert rotated == [False] * 3
    (found,) = report = adapter.enable(model, fused_rope=True)
    assert (found.by_umfa, found.fused) == (3, 3)
    assert str(report).endswith("3 through diffusers' dispatcher, 3 of them with rotary embedding")
    rotated.clear()
    ours = run(model, inputs)
    assert rotated == [True] * 3
    if dtype == "bfloat16":  # rotated rows are rounded to it, so that nothing differs
        assert torch.equal(ours, apart)
    else:
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    # Positions matter in this test: other ones give another result.
    moved = run(model, {**inputs, "img_ids": inputs["img_ids"].flip(0)})
    assert (moved - ours).norm() > 1e-3 * ours.norm()

    (found,) = adapter.enable(model)  # without it
    assert found.fused == 0
    rotated.clear()
    run(model, inputs)
    assert rotated == [False] * 3
    adapter.enable(model, fused_rope=True)
    adapter.disable(model)
    assert [type(processor) for processor in model.attn_processors.values()] == kinds
    assert torch.equal(run(model, inputs), stock)


def test_rotary_embedding_with_a_mask() -> None:
    model, inputs = flux()
    mask = torch.ones(1, 1, 22, 22).tril().bool()
    inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    stock = run(model, inputs)
    adapter.enable(model, fused_rope=True)
    torch.testing.assert_close(run(model, inputs), stock, rtol=1e-4, atol=1e-5)
    del inputs["joint_attention_kwargs"]
    assert not torch.allclose(run(model, inputs), stock, rtol=1e-4, atol=1e-5)


def test_gradients_through_the_rotation(rotated: list[bool]) -> None:
    model, inputs = flux()

    def gradients() -> list[Any]:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    stock = gradients()
    adapter.enable(model, fused_rope=True)
    for x, y in zip(gradients(), stock, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    assert rotated == [True] * 3


def test_another_backend_still_gets_rotated_rows(rotated: list[bool]) -> None:
    model, inputs = flux()
    stock = run(model, inputs)
    adapter.enable(model, fused_rope=True)
    model.set_attention_backend("native")
    umfa.torch.disable()
    assert torch.equal(run(model, inputs), stock)
    assert rotated == []


def test_a_model_that_torch_switched_off_keeps_nothing_on() -> None:
    first, second = flux()[0], vae()[0]
    adapter.enable(first)
    umfa.torch.disable()
    adapter.enable(second)
    adapter.disable(second)
    assert not umfa.torch.is_enabled()


def test_copies_and_pickles_while_the_kernel_rotates(rotated: list[bool]) -> None:
    model, inputs = flux()
    stock = run(model, inputs)
    adapter.enable(model, fused_rope=True)
    copies = deepcopy(model), pickle.loads(pickle.dumps(model))
    for copy in copies:
        rotated.clear()
        torch.testing.assert_close(run(copy, inputs), stock, rtol=1e-4, atol=1e-5)
        assert rotated == [True] * 3
        adapter.disable(copy)
    adapter.disable(model)  # until then PyTorch's attention is umfa's
    for copy in copies:
        assert torch.equal(run(copy, inputs), stock)


def test_a_graph_with_the_rotation() -> None:
    model, inputs = flux()
    stock = run(model, inputs)
    adapter.enable(model, fused_rope=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = umfa.stats().cpu_calls
    torch.testing.assert_close(run(compiled, inputs), stock, rtol=1e-4, atol=1e-5)
    assert umfa.stats().cpu_calls - before == 3


@pytest.mark.parametrize("make", [sd3, vae], ids=lambda make: make.__name__)
def test_rotation_is_refused_where_there_is_none(make: Any) -> None:
    model, _ = make()
    with pytest.raises(umfa.UnsupportedError, match=r"fused_rope fits none of the processors; got"):
        adapter.enable(model, fused_rope=True)
    assert not umfa.torch.is_enabled()


def test_what_a_pipeline_has_beside_flux_is_not_rotated() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.components = {"vae": vae()[0], "transformer": flux()[0], "other": wan()[0]}

    report = adapter.enable(Pipeline(), fused_rope=True)
    assert [found.fused for found in report] == [0, 3, 0]
