"""Families of models and ways to run them, beyond those that test_transformers.py always runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.tiny_models import (
    FAMILIES,
    USUAL,
    both,
    model_of,
    packed_positions,
    tokens,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("umfa.transformers")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

TAKEN = "transformers.attention"
WRITTEN = f"{TAKEN} with a mask that is written out"
VARLEN = "transformers.flash_attn_varlen_func"
DENSE = "transformers.flash_attn_func"
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
         "intermediate_size": 48}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register()
    transformers.logging.set_verbosity_error()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def gradients(model: Any, loss: Callable[[Any], Any], name: str = "umfa") -> dict[str, int]:
    """Compare the loss and every gradient of a training step; returns what umfa computed."""
    model = model.train()

    def run(model: Any) -> list[Any]:
        model.zero_grad()
        value = loss(model)
        value.backward()
        return [value, *(x.grad for x in model.parameters() if x.grad is not None)]

    expected, found, taken = both(model, run, name)
    assert len(expected) == len(found) > 10
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 + 1e-4 * float(y.abs().max()))
    return taken


# ---- decoders ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["beams", "prompt lookup", "assisted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ways_to_generate(family: str, way: str) -> None:
    ids, there = tokens()
    more: dict[str, Any] = {"num_beams": 3}
    if way != "beams":
        ids, there = ids[1:], there[1:]
        more = {"prompt_lookup_num_tokens": 3}
    if way == "assisted":
        more = {"assistant_model": model_of("llama", num_hidden_layers=1)}
        more["assistant_model"].set_attn_implementation("umfa")

    def run(model: Any) -> Any:
        return model.generate(ids, attention_mask=there, max_new_tokens=8, do_sample=False, **more)

    expected, found, taken = both(model_of(family), run)
    assert torch.equal(found, expected)
    if family == "llama4_text" and way == "beams":  # chunks that begin elsewhere in each row
        assert set(taken) == {TAKEN, WRITTEN}
    else:
        assert set(taken) == {TAKEN}


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "left", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family: str, padding: str) -> None:
    if padding == "packed":
        ids, positions = packed_positions()
        given = {"position_ids": positions}
        labels = ids
    else:
        ids, there = tokens()
        there = there if padding == "left" else torch.ones_like(there)
        given = {"attention_mask": there}
        # A row of padding sees no key: umfa and "sdpa" give 0, "eager" the mean of all values.
        # It would predict the first token.
        labels = ids.masked_fill(there == 0, -100)
        labels[0, there[0].argmax()] = -100

    def loss(model: Any) -> Any:
        return model(ids, labels=labels, use_cache=False, **given).loss

    taken = gradients(model_of(family), loss)
    assert sum(taken.values()) == 3
    if family == "llama4_text" and padding == "left":
        assert WRITTEN in taken
    else:
        assert set(taken) == {TAKEN}


# ---- encoders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [
    "bert",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("albert", "modernbert", "roberta")),
])  # fmt: skip
@pytest.mark.parametrize("name", ["umfa", "umfa_flash"])
def test_an_encoder_of_text(family: str, name: str) -> None:
    """Its hidden states and, with right padding, the gradients of a training step."""
    torch.manual_seed(0)
    more = {"local_attention": 8, "global_attn_every_n_layers": 2} if "modern" in family else {}
    config = transformers.AutoConfig.for_model(
        family, **{**USUAL, "embedding_size": 32, "attention_dropout": 0.0, **more},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    ids, there = (x.flip(1) for x in tokens())

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(ids, attention_mask=there).last_hidden_state[there.bool()]

    expected, found, taken = both(model, run, name)
    assert_close(found, expected)
    kinds = {TAKEN} if name == "umfa" else {DENSE, VARLEN} if "modern" in family else {DENSE}
    assert set(taken) == kinds
    assert sum(taken.values()) == 3

    def loss(model: Any) -> Any:
        out = model(ids, attention_mask=there).last_hidden_state[there.bool()]
        return out.square().mean() + out[:, 0].mean()

    assert set(gradients(model, loss, name)) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "clip_vision_model", "siglip_vision_model", "dinov2"])
@pytest.mark.parametrize("name", ["umfa", "umfa_flash"])
def test_an_encoder_of_images(family: str, name: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL, image_size=32, patch_size=8)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, 32, 32)

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(pixels).last_hidden_state

    expected, found, taken = both(model, run, name)
    assert_close(found, expected)
    assert taken[TAKEN if name == "umfa" else DENSE] >= 2


# ---- two inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["umfa", pytest.param("umfa_flash", marks=pytest.mark.slow)])
def test_cross_attention(name: str) -> None:
    """Whisper: an encoder of sound without a mask, and a decoder that looks at it, with caches for
    both."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16,
        max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    sound = torch.randn(2, 16, 40)
    ids = torch.randint(4, 100, (2, 7))

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model(input_features=sound, decoder_input_ids=ids).logits

    expected, found, taken = both(model, logits, name)
    assert_close(found, expected)
    assert taken == {TAKEN if name == "umfa" else DENSE: 2 + 2 * 2}

    def generated(model: Any) -> Any:
        return model.generate(sound, max_new_tokens=6, do_sample=False)

    expected, found, taken = both(model, generated, name)
    assert torch.equal(found, expected)
    # In each step 2 layers look at the tokens, and 2 at the sound.
    assert sum(taken.values()) == 2 + 4 * 6
    gradients(model, lambda x: x(input_features=sound, labels=ids).loss, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["umfa", "umfa_flash"])
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
def test_images_of_different_sizes(family: str, name: str) -> None:
    """Qwen-VL's encoder packs patches of all images: lengths for flash attention, else one call for
    each image. Qwen2.5-VL sees windows in most layers."""
    torch.manual_seed(0)
    text = {**USUAL, "max_position_embeddings": 128, "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2,
                              "spatial_merge_size": 2}  # fmt: skip
    if family == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48,
                   "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    tokens_of = {"image_token_id": 190, "video_token_id": 191, "vision_start_token_id": 192,
                 "vision_end_token_id": 193}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, **tokens_of
    )
    model = (
        getattr(transformers, f"{family}ForConditionalGeneration")
        ._from_config(config, attn_implementation="eager")
        .eval()
    )
    grids = torch.tensor([[1, 8, 8], [1, 4, 12]])  # patches: time, height, width
    patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4)
    images = [[192, *[190] * (int(n) // 4), 193] for n in grids.prod(1)]
    ids = torch.tensor([[5, *images[0], 6, 7, *images[1], 8, 9]])
    given = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grids,
             "mm_token_type_ids": (ids == 190).long()}  # fmt: skip

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(**given).logits

    expected, found, taken = both(model, run, name)
    assert_close(found, expected)
    if name == "umfa_flash":
        assert taken == {VARLEN: 2, DENSE: 2}
    else:
        assert set(taken) == {TAKEN}
        assert taken[TAKEN] >= 2 + 2 * 2


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_image_tokens_that_see_each_other(padded: bool) -> None:
    """Gemma 3: the tokens of an image see each other both ways, in a causal text."""
    torch.manual_seed(0)
    text = {**USUAL, "sliding_window": 8, "head_dim": 16, "num_hidden_layers": 2}
    vision = {**SMALL, "image_size": 16, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=190,
        boi_token_index=191, eoi_token_index=192,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([[5, 6, 191, *[190] * 4, 192, 7, 8, 9, 10, 11, 12, 13, 14]])
    there = torch.ones_like(ids)
    if padded:
        ids[0, :2], there[0, :2] = 0, 0
    kinds = (ids == 190).long()
    pixels = torch.randn(1, 3, 16, 16)

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model(
                ids, attention_mask=there, pixel_values=pixels, token_type_ids=kinds
            ).logits[there.bool()]

    expected, found, taken = both(model, logits)
    assert_close(found, expected)
    assert taken == {TAKEN: 2, WRITTEN: 2}  # the image's encoder; the text's two layers

    def generated(model: Any) -> Any:
        return model.generate(
            ids, attention_mask=there, pixel_values=pixels, token_type_ids=kinds, max_new_tokens=6,
            do_sample=False,
        )  # fmt: skip

    expected, found, _ = both(model, generated)
    assert torch.equal(found, expected)
