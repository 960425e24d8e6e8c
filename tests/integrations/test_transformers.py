"""attn_implementation="umfa": models of transformers with random weights, beside "eager"."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import umfa

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("umfa.transformers")
masking = pytest.importorskip("transformers.masking_utils")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

TAKEN = "transformers.attention"
WRITTEN = f"{TAKEN} with a mask that is written out"

USUAL = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "head_dim": 16},
    "gemma3_text": {"sliding_window": 8, "head_dim": 16},
    "gpt_oss": {"sliding_window": 8, "head_dim": 16, **EXPERTS},
    "qwen3": {"head_dim": 16},
    "llama4_text": {
        "attention_chunk_size": 8, "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 0],
        **EXPERTS,
    },
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
    },
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register()
    transformers.logging.set_verbosity_error()


def model_of(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**USUAL, **FAMILIES[family], **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def taken_by(before: umfa.Stats) -> dict[str, int]:
    return dict(Counter(umfa.stats().taken) - Counter(before.taken))


def both(model: Any, run: Any) -> tuple[Any, Any, dict[str, int]]:
    """What `run` gives on eager attention and on umfa, and what umfa computed."""
    model.set_attn_implementation("eager")
    expected = run(model)
    model.set_attn_implementation("umfa")
    before = umfa.stats()
    return expected, run(model), taken_by(before)


def tokens(batch: int = 2, seqlen: int = 21) -> tuple[Any, Any]:
    """Ids and a mask whose first row is padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 200, (batch, seqlen))
    there = torch.ones_like(ids)
    there[0, :5] = ids[0, :5] = 0
    return ids, there


PADDING = {"none": lambda x: torch.ones_like(x), "left": lambda x: x, "right": lambda x: x.flip(1)}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=() if x == "llama" else pytest.mark.slow) for x in FAMILIES]
)
def test_generate(family: str, padding: str, cache: str) -> None:
    model, (ids, there) = model_of(family), tokens()

    def run(model: Any) -> Any:
        return model.generate(
            ids, attention_mask=PADDING[padding](there), max_new_tokens=8, do_sample=False,
            cache_implementation="static" if cache == "static" else None, disable_compile=True,
        )  # fmt: skip

    expected, found, taken = both(model, run)
    # What follows a token that is not there means nothing: its query may see no key at all.
    sound = PADDING[padding](there)[:, -1].bool()
    assert torch.equal(found[sound], expected[sound])
    assert sum(taken.values()) == 8 * model.config.num_hidden_layers
    if family == "llama4_text" and padding == "left":  # chunks that begin elsewhere in each row
        assert WRITTEN in taken
    else:
        assert set(taken) == {TAKEN}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_padded_batch(family: str) -> None:
    model, (ids, there) = model_of(family), tokens()

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(ids, attention_mask=there).logits[there.bool()]

    expected, found, _ = both(model, run)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_other_ways_to_generate(more: dict[str, int]) -> None:
    ids, there = tokens()
    if "num_beams" not in more:
        ids, there = ids[1:], there[1:]
    expected, found, taken = both(
        model_of("mistral"),
        lambda model: model.generate(
            ids, attention_mask=there, max_new_tokens=8, do_sample=False, **more
        ),
    )
    assert torch.equal(found, expected)
    assert set(taken) == {TAKEN}


def packed_positions() -> tuple[Any, Any]:
    torch.manual_seed(2)
    ids = torch.randint(3, 200, (2, 21))
    lengths = ((5, 9, 7), (12, 1, 8))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("mistral", marks=pytest.mark.slow), "gpt_oss"]
)
def test_gradients_of_packed_sequences(family: str) -> None:
    model = model_of(family).train()
    ids, positions = packed_positions()

    def run(model: Any) -> list[Any]:
        model.zero_grad()
        loss = model(ids, position_ids=positions, use_cache=False).logits.float().square().mean()
        loss.backward()
        return [loss, *(x.grad for x in model.parameters() if x.grad is not None)]

    expected, found, taken = both(model, run)
    assert set(taken) == {TAKEN}
    assert len(expected) == len(found) > 10
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 + 1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders(family: str, padded: bool) -> None:
    torch.manual_seed(0)
    more = {"local_attention": 8, "global_attn_every_n_layers": 2} if family != "bert" else {}
    config = transformers.AutoConfig.for_model(family, **{**USUAL, **more})
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    ids, there = tokens()
    there = there if padded else torch.ones_like(there)

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(ids, attention_mask=there).last_hidden_state[there.bool()]

    expected, found, taken = both(model, run)
    assert taken == {TAKEN: 3}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_relative_positions() -> None:
    """T5: a bias of the scores, causal or not, with padding."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    ids, there = tokens()

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=there, decoder_input_ids=ids).logits

    expected, found, taken = both(model, run)
    assert sum(taken.values()) == 6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


MASKS: dict[str, Any] = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "window": masking.sliding_window_causal_mask_function(4),
    "bidirectional window": masking.sliding_window_bidirectional_mask_function(4),
    "chunks": masking.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "shifted chunks": masking.chunked_causal_mask_function(4, torch.full((2,), 3)),
    "chunks by row": masking.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "packed": masking.and_masks(
        masking.causal_mask_function,
        masking.packed_sequence_mask_function(torch.tensor([[0] * 4 + [1] * 6, [0] * 9 + [1]])),
    ),
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("q_offset", "q_length", "kv_length"),
    [(0, 10, 10), (7, 3, 10), (9, 1, 10), (2, 3, 10), (0, 4, 10)],
    ids=["prefill", "chunk of a prefill", "decode", "static cache", "static prefill"],
)
@pytest.mark.parametrize("kind", MASKS)
def test_each_mask_means_what_transformers_writes_out(
    kind: str, q_offset: int, q_length: int, kv_length: int, padded: bool
) -> None:
    if kind == "packed" and (q_length != kv_length or padded):
        pytest.skip("transformers packs whole sequences without padding")
    there = torch.ones(2, kv_length, dtype=torch.bool)
    if padded:
        there[0, :2] = there[1, 8:] = False
    asked = {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "mask_function": MASKS[kind], "attention_mask": there,
    }  # fmt: skip
    mask = adapter._masks.mask(**asked)
    assert isinstance(mask, adapter._masks.Mask)
    assert mask.shape == (2, 1, q_length, kv_length)
    written = masking.sdpa_mask(**asked, allow_is_causal_skip=False)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 2, q_length, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, kv_length, 8, generator=generator)
    found, weights = adapter._attention.attention(torch.nn.Module(), q, k, v, mask)
    expected = umfa.scaled_dot_product_attention(q, k, v, written).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_that_masks_nothing_gets_no_mask() -> None:
    asked = {
        "batch_size": 1, "q_length": 6, "kv_length": 6,
        "mask_function": masking.bidirectional_mask_function,
    }  # fmt: skip
    assert adapter._masks.mask(**asked, allow_is_bidirectional_skip=True) is None
    assert adapter._masks.mask(**asked) is not None
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = transformers.BeitModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(1, 3, 32, 32)
    expected, found, taken = both(model, lambda model: model(pixels).last_hidden_state)
    assert sum(taken.values()) == 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_mask_is_written_out() -> None:
    def odd(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (q + k) % 2 == 0

    asked = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": odd}
    mask = adapter._masks.mask(**asked)
    assert torch.equal(mask, masking.sdpa_mask(**asked, allow_is_causal_skip=False))
    blocks = masking.or_masks(
        masking.causal_mask_function,
        masking.blockwise_overlay(torch.zeros(1, 6, dtype=torch.int64)),
    )
    assert bool(adapter._masks.mask(**{**asked, "mask_function": blocks}).all())


def test_a_model_that_computes_with_its_mask_is_told() -> None:
    mask = adapter._masks.mask(batch_size=1, q_length=6, kv_length=6)
    with pytest.raises(umfa.UnsupportedError, match="computes with its mask"):
        mask + 1


@pytest.mark.slow
def test_memory_of_a_long_padded_prefill(run_python: Any) -> None:
    """At most 1.1 times that of a prefill without padding; as bool the mask alone is 64 MiB."""
    script = (
        "import resource, sys, torch, transformers, umfa.transformers as t\n"
        "t.register()\n"
        "c = transformers.AutoConfig.for_model('mistral', vocab_size=64, hidden_size=32,\n"
        "    intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,\n"
        "    num_key_value_heads=1, sliding_window=64, max_position_embeddings=16384)\n"
        "m = transformers.AutoModel.from_config(c, attn_implementation='umfa').eval()\n"
        "ids = torch.randint(3, 64, (1, 8192))\n"
        "there = torch.ones_like(ids)\n"
        "if sys.argv[1] == 'padded': there[0, :100] = 0\n"
        "with torch.no_grad(): m(ids[:, :64], attention_mask=there[:, :64])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with torch.no_grad(): m(ids, attention_mask=there)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = {}
    for kind in ("whole", "padded"):
        done = run_python(script, kind)
        assert done.returncode == 0, done.stderr
        grown[kind] = int(done.stdout)
    assert grown["padded"] <= 1.1 * grown["whole"] + 4096, grown
