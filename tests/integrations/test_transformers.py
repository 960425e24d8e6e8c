"""attn_implementation="umfa": models of transformers with random weights, beside "eager"."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import umfa
from tests.integrations.tiny_models import (
    FAMILIES,
    USUAL,
    both,
    model_of,
    packed_positions,
    taken_by,
    tokens,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("umfa.transformers")
masking = pytest.importorskip("transformers.masking_utils")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

TAKEN = "transformers.attention"
WRITTEN = f"{TAKEN} with a mask that is written out"


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register()
    transformers.logging.set_verbosity_error()


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


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()


def test_relative_positions() -> None:
    """T5: a bias of the scores, causal or not, with padding."""
    model = t5()
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


@pytest.mark.parametrize(
    ("family", "more", "instead"),
    [
        ("bloom", {}, '"eager"'),
        ("mpt", {"n_layers": 2, "d_model": 64, "n_heads": 4}, '"eager"'),
        ("falcon", {}, r'"sdpa", which umfa.torch.enable\(\) computes'),
    ],
)
def test_a_model_with_attention_of_its_own_is_refused(
    family: str, more: dict[str, int], instead: str
) -> None:
    config = transformers.AutoConfig.for_model(family, **{**USUAL, **more})
    make = transformers.AutoModelForCausalLM.from_config
    expected = f"computes attention in its own code.*{instead}"
    model = make(config, attn_implementation="eager")
    with pytest.raises(umfa.UnsupportedError, match=expected):
        model.set_attn_implementation("umfa")
    assert model.config._attn_implementation == "eager"
    config = transformers.AutoConfig.for_model(family, **{**USUAL, **more})
    with pytest.raises(umfa.UnsupportedError, match=expected):
        make(config, attn_implementation="umfa")


@pytest.mark.parametrize("alibi", [False, True])
def test_falcon_runs_on_umfa_through_torch(alibi: bool) -> None:
    """As its refusal says."""
    adapter_of_torch = pytest.importorskip("umfa.torch")
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=alibi
    )
    model = transformers.FalconForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ids, there = tokens()
    with torch.no_grad():
        expected = model(ids, attention_mask=there).logits[there.bool()]
        before = umfa.stats()
        with adapter_of_torch.sdpa():
            found = model(ids, attention_mask=there).logits[there.bool()]
    assert taken_by(before) == {"torch.scaled_dot_product_attention": 2}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_part_with_attention_of_its_own_is_counted() -> None:
    """BERT as the encoder, on umfa, and RemBERT as the decoder, with code of its own."""
    torch.manual_seed(0)
    parts = [transformers.AutoConfig.for_model(x, **USUAL) for x in ("bert", "rembert")]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = transformers.EncoderDecoderModel(config=config).eval()
    ids, there = tokens()
    before = umfa.stats()

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(ids, attention_mask=there, decoder_input_ids=ids).logits

    expected, found, taken = both(model, run)
    assert taken == {TAKEN: 3}
    left = {x.where: x.reason for x in umfa.stats().left if x not in before.left}
    assert left == {
        f"transformers.RemBert{kind}": "computes attention in its own code"
        for kind in ("Model", "ForCausalLM")
    }
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bert", "t5"])
def test_weights_come_from_eager_attention(family: str) -> None:
    ids, there = tokens()
    if family == "bert":
        config = transformers.AutoConfig.for_model(family, **USUAL)
        model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    elif family == "t5":
        model = t5()
    else:
        model = model_of(family)

    def run(model: Any) -> Any:
        more = {"decoder_input_ids": ids} if family == "t5" else {}
        with torch.no_grad():
            return model(ids, attention_mask=there, output_attentions=True, **more)

    before = umfa.stats()
    expected, found, taken = both(model, run)
    assert not taken
    counted = [x for x in umfa.stats().left if "output_attentions=True" in x.reason]
    earlier = sum(x.calls for x in before.left if "output_attentions=True" in x.reason)
    assert sum(x.calls for x in counted) - earlier == (6 if family == "t5" else 3)
    for name in ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions"):
        theirs = expected.get(name) or ()
        assert len(found.get(name) or ()) == len(theirs)
        for x, y in zip(found.get(name) or (), theirs, strict=True):
            torch.testing.assert_close(x, y)
    torch.testing.assert_close(found[0][there.bool()], expected[0][there.bool()])


def test_a_model_that_computes_with_its_mask_is_told() -> None:
    mask = adapter._masks.mask(batch_size=1, q_length=6, kv_length=6)
    with pytest.raises(umfa.UnsupportedError, match="computes with its mask"):
        mask + 1


PREFILL = """
import sys, torch, transformers, umfa.transformers

def status(field):
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith(field + ":"))

torch.set_num_threads(1)
umfa.transformers.register()
family, padded = sys.argv[1:]
config = transformers.AutoConfig.for_model(
    family, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, sliding_window=64,
    max_position_embeddings=32768, tie_word_embeddings=False,
)
model = transformers.AutoModel.from_config(config, attn_implementation="umfa").eval()
ids = torch.randint(3, 64, (1, 32768))
there = None
if padded == "padded":
    there = torch.ones_like(ids)
    there[0, :100] = 0
with torch.no_grad():
    model(ids[:, :256], attention_mask=None if there is None else there[:, :256])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    before = status("VmRSS")
    model(ids, attention_mask=there)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_memory_of_a_long_padded_prefill(family: str, run_python: Any) -> None:
    """At most 1.1 times that of a prefill without padding; as bool the mask alone takes 1 GiB."""
    peaks = {}
    for kind in ("whole", "padded"):
        # A fixed threshold: else glibc keeps some tensors that are freed, and not in every run.
        done = run_python(PREFILL, family, kind, timeout=600, MALLOC_MMAP_THRESHOLD_="65536")
        assert done.returncode == 0, done.stderr
        peaks[kind] = int(done.stdout)  # KiB
    assert peaks["whole"] > 10_000, peaks
    assert peaks["padded"] <= 1.1 * peaks["whole"], peaks
