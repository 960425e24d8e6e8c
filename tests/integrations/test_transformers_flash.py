"""attn_implementation="umfa_flash": what transformers asks of flash attention only."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import umfa
from tests.integrations.tiny_models import both, model_of, packed_positions, taken_by, tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("umfa.transformers")
flash = pytest.importorskip("transformers.modeling_flash_attention_utils")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

VARLEN = "transformers.flash_attn_varlen_func"
DENSE = "transformers.flash_attn_func"
SMALL = ["llama", "mistral", pytest.param("gpt_oss", marks=pytest.mark.slow)]
"""Causal; with a sliding window; with sinks too."""


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register()
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", SMALL)
def test_generate(family: str, padded: bool) -> None:
    ids, there = tokens()
    there = there if padded else torch.ones_like(there)

    def run(model: Any) -> Any:
        return model.generate(ids, attention_mask=there, max_new_tokens=8, do_sample=False)

    expected, found, taken = both(model_of(family), run, "umfa_flash")
    assert torch.equal(found, expected)
    assert sum(taken.values()) == 8 * 3
    # A window that has passed the padding needs no lengths.
    if padded:
        assert set(taken) == ({VARLEN} if family == "llama" else {VARLEN, DENSE})
    else:
        assert set(taken) == {DENSE}


@pytest.mark.parametrize("family", SMALL)
def test_gradients_of_packed_sequences(family: str) -> None:
    """In one row, as transformers' collator without padding makes them, beside each alone.

    The eager attention of GPT-OSS does not separate them.
    """
    model = model_of(family).train()
    ids, positions = (x.reshape(1, -1) for x in packed_positions())
    begins = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]

    def run(logits: Any) -> list[Any]:
        model.zero_grad()
        loss = logits.float().square().mean()
        loss.backward()
        return [loss, *(x.grad for x in model.parameters() if x.grad is not None)]

    parts = [ids[:, a:b] for a, b in itertools.pairwise(begins)]
    expected = run(torch.cat([model(x, use_cache=False).logits for x in parts], dim=1))
    model.set_attn_implementation("umfa_flash")
    before = umfa.stats()
    found = run(model(ids, position_ids=positions, use_cache=False).logits)
    assert taken_by(before) == {VARLEN: 3}
    assert len(expected) == len(found) > 10
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 + 1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("family", SMALL)
def test_generate_batch(family: str) -> None:
    """Continuous batching, whose prompts have different lengths and leave at different times."""
    torch.manual_seed(3)
    prompts = [torch.randint(3, 200, (n,)).tolist() for n in (5, 21, 13)]
    settings = transformers.GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=32, page_size=16, auto_switch_to_flash=False
    )
    model = model_of(family)
    found = {}
    before = umfa.stats()
    for name in ("sdpa", "umfa_flash") if model._supports_sdpa else ("paged|eager", "umfa_flash"):
        model.set_attn_implementation(name)
        done = model.generate_batch(
            prompts,
            generation_config=settings,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        assert len(done) == len(prompts)
        found[name] = {tuple(x.prompt_ids): x.generated_tokens for x in done.values()}
    theirs, ours = found.values()
    assert ours == theirs
    assert {len(x) for x in ours.values()} == {8}
    # At least one step for each token after a prompt; 64 tokens are too many for one step.
    calls = umfa.stats().taken[VARLEN] - before.taken.get(VARLEN, 0)
    assert calls >= 8 * 3
    assert calls % 3 == 0


def test_autocast_and_other_linear_layers() -> None:
    """transformers' own function would convert to the dtype of a Linear, which GPT-2 lacks."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    ids, there = tokens()

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(ids, attention_mask=there).logits[there.bool()]

    expected, found, taken = both(model, run, "umfa_flash")
    assert taken == {VARLEN: 2}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found, taken = both(model, run, "umfa_flash")
    assert taken == {VARLEN: 2}
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


def test_what_flash_attention_lacks_is_refused() -> None:
    with pytest.raises(umfa.UnsupportedError, match="Llama4ForCausalLM does not support flash"):
        model_of("llama4_text").set_attn_implementation("umfa_flash")
    model = model_of("llama")
    model.set_attn_implementation("umfa_flash")
    with pytest.raises(umfa.UnsupportedError, match="has no weights to return"):
        model(tokens()[0], output_attentions=True)
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(umfa.UnsupportedError, match=r"position_bias \(1, 2, 3, 3\)"):
        adapter._flash.attention(model, q, q, q, None, position_bias=torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 5).tril(), torch.zeros(2, 1, 8, 8), torch.zeros(1, 8)],
    ids=["too short", "of scores", "another batch"],
)
def test_masks_of_wrong_shapes(mask: Any) -> None:
    model = model_of("llama")
    model.set_attn_implementation("umfa_flash")
    with pytest.raises(
        ValueError, match=r"^\[umfa\.transformers\] attention_mask has the wrong shape; got"
    ):
        model(torch.ones(2, 8, dtype=torch.long), attention_mask=mask)


@pytest.mark.parametrize("rows", [1, 4, 6, 8])
def test_attention_to_a_padded_encoder(rows: int) -> None:
    """The padding is that of the keys, also where query and keys have as many rows."""
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    ids, there = torch.arange(12).reshape(2, 6) + 3, torch.ones(2, 6, dtype=torch.long)
    there[0, 3:] = 0
    decoder_ids = torch.arange(2 * rows).reshape(2, rows) + 20
    torch.manual_seed(0)
    model = transformers.BartModel._from_config(config, attn_implementation="eager").eval()
    expected, found, taken = both(
        model,
        lambda x: (
            x(input_ids=ids, attention_mask=there, decoder_input_ids=decoder_ids).last_hidden_state
        ),
        "umfa_flash",
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(taken.values()) == 3


def test_unregister_restores_transformers() -> None:
    names = ("get_correct_attn_implementation", "_check_and_adjust_attn_implementation",
             "set_attn_implementation")  # fmt: skip
    base = transformers.PreTrainedModel
    adapter.unregister()
    stock = [getattr(base, name) for name in names]
    imports, interfaces = flash._lazy_imports, transformers.AttentionInterface().valid_keys()
    assert "umfa" not in interfaces
    adapter.register()
    adapter.register()
    assert flash._lazy_imports is not imports
    model = model_of("llama")
    model.set_attn_implementation("umfa_flash")
    adapter.unregister()
    with pytest.raises(KeyError, match="umfa_flash"):
        model(tokens()[0])
    model.set_attn_implementation("eager")
    assert [getattr(base, name) for name in names] == stock
    assert all(x.__module__ == base.__module__ for x in stock)
    assert flash._lazy_imports is imports
    assert imports.__module__ == flash.__name__
    assert transformers.AttentionInterface().valid_keys() == interfaces
    with pytest.raises(ValueError, match="Could not find any flash attn implementation"):
        flash.lazy_import_flash_attention(None)
    with pytest.raises(ValueError, match='attn_implementation="umfa"` is not supported'):
        model_of("llama").set_attn_implementation("umfa")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", "AttentionInterface"),
        ("class AttentionInterface: ...\nclass AttentionMaskInterface: ...", "masking_utils"),
    ],
)
def test_a_transformers_without_interfaces_is_named(
    text: str, missing: str, tmp_path: Any, run_python: Any
) -> None:
    (tmp_path / "transformers.py").write_text(f"__version__ = '4.30.2'\n{text}\n")
    done = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n"
        "    import umfa.transformers\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[umfa.transformers] this transformers cannot be extended")
    assert f"'{missing}'" in done.stdout
    assert done.stdout.rstrip().endswith("; got transformers 4.30.2; expected 5.24 or later")


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 5.0, masks are described by positions in the cache, and there is no third function."""
    adapter.unregister()
    masking = pytest.importorskip("transformers.masking_utils")

    def older(batch_size: int, cache_position: Any, kv_length: int, **others: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(masking, "sdpa_mask", older)
        with pytest.raises(
            umfa.UnsupportedError, match=r"got transformers 5\.[\d.]+; expected 5.24"
        ):
            adapter.register()
    with monkeypatch.context() as patch:
        patch.delattr(flash, "_flash_with_kvcache_fn")
        with pytest.raises(umfa.UnsupportedError, match=r"umfa\.transformers\.register"):
            adapter.register()
    assert "umfa" not in transformers.AttentionInterface().valid_keys()
    adapter.register()
