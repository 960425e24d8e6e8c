"""umfa.transformers.QuantizedCache: generation from quantised keys and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import umfa
from tests.integrations.tiny_models import FAMILIES, model_of, taken_by, tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("umfa.transformers")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

INT4 = {"dtype": "int4", "block": (1, 16), "granularity": "block", "scale_dtype": "float16"}
TAKEN = "transformers.attention"


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register()
    transformers.logging.set_verbosity_error()


def model_on(name: str, family: str = "llama") -> Any:
    model = model_of(family)
    model.set_attn_implementation(name)
    return model


def logits(model: Any, cache: Any, ids: Any, there: Any) -> Any:
    """Of a prompt in two parts, and three steps behind it."""
    found = []
    with torch.no_grad():
        for first, end in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
            out = model(
                ids[:, first:end], attention_mask=there[:, :end], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            found.append(out.logits)
    return torch.cat(found, 1)[there.bool()]


@pytest.mark.parametrize("form", [{}, INT4, {"dtype": "float8_e4m3fn"}], ids=str)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(x, marks=() if x in ("llama", "gemma3_text") else pytest.mark.slow)
        for x in FAMILIES
    ],
)
def test_attention_on_codes_is_that_on_their_numbers(family: str, form: dict[str, Any]) -> None:
    """ "eager" gets the numbers, which "umfa" never writes out."""
    ids, there = tokens()
    ids, there = ids[:, :12], there[:, :12]
    form = form | {"smooth_keys": family not in ("gemma2", "gpt_oss")}
    expected = logits(model_on("eager", family), adapter.QuantizedCache(**form), ids, there)
    before = umfa.stats()
    cache = adapter.QuantizedCache(**form)
    model = model_on("umfa", family)
    found = logits(model, cache, ids, there)
    # Rounding in one layer may change codes in the next.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)
    assert sum(taken_by(before).values()) == 5 * model.config.num_hidden_layers
    # DeepSeek keeps what keys and values are made of.
    assert (umfa.stats().left == before.left) is (family != "deepseek_v3")
    assert cache.get_seq_length() == 12
    plain = logits(model, transformers.DynamicCache(), ids, there)
    assert 0 < (found - plain).abs().max() < 0.5


def test_numbers_that_are_written_out_are_counted() -> None:
    ids, there = tokens()
    before = sum(x.calls for x in umfa.stats().left)
    logits(model_on("sdpa"), adapter.QuantizedCache(), ids[:, :12], there[:, :12])
    assert sum(x.calls for x in umfa.stats().left) > before
    assert "transformers.QuantizedCache" in str(umfa.stats())


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate(more: dict[str, Any]) -> None:
    ids, there = tokens()
    if "prompt_lookup_num_tokens" in more:
        ids, there = ids[:1], there[:1]
    model = model_on("umfa")

    def run(**cache: Any) -> Any:
        return model.generate(
            ids, attention_mask=there, max_new_tokens=12, do_sample=False, **more, **cache
        )

    config = {"backend": "umfa", "dtype": "int8", "scale_dtype": "float16"}
    found = run(cache_implementation="quantized", cache_config=config)
    assert torch.equal(
        found, run(past_key_values=adapter.QuantizedCache("int8", scale_dtype="float16"))
    )
    assert (
        found == run()
    ).float().mean() > 0.8  # plain states: few tokens of random weights differ


def test_other_backends_are_transformers_own() -> None:
    ids, _ = tokens()
    with pytest.raises((ImportError, ValueError)):
        model_on("umfa").generate(
            ids, max_new_tokens=2, cache_implementation="quantized",
            cache_config={"backend": "unknown"},
        )  # fmt: skip
    adapter.unregister()
    try:
        with pytest.raises(ValueError, match="Unknown quantization backend `umfa`"):
            model_on("eager").generate(
                ids, max_new_tokens=2, cache_implementation="quantized",
                cache_config={"backend": "umfa"},
            )  # fmt: skip
    finally:
        adapter.register()


def states(seed: int, tokens: int, batch: int = 2) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 2, tokens, n, generator=generator) for n in (32, 16))
    return keys, values


def test_a_layer() -> None:
    """Room is added, and tokens and rows of the batch come and go."""
    cache = adapter.QuantizedCache(smooth_keys=False)
    parts = [states(i, n) for i, n in enumerate((200, 100, 1, 300))]
    for part in parts:
        keys, values = cache.update(*part, 0)
    whole = [torch.cat(x, -2) for x in zip(*parts, strict=True)]
    for found, x in ((keys, whole[0]), (values, whole[1])):
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        expected = umfa.quantize(x, "int8", layout="bhsd").dequantize()
        assert torch.equal(found.written(), expected)
        assert torch.equal(found + 0, expected)
    assert cache.get_seq_length() == 601
    assert cache.get_mask_sizes(4, 0) == (605, 0)
    assert cache.nbytes == 2 * 2 * 768 * (32 + 16 + 2 * 4)

    kept = copy.deepcopy(cache)
    cache.crop(-100)
    assert cache.get_seq_length() == 501
    new = states(9, 3)
    keys, _ = cache.update(*new, 0)
    assert torch.equal(
        keys.written()[..., :501, :], kept.layers[0].update(*new, 0)[0].written()[..., :501, :]
    )
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3]))
    other, _ = cache.update(*states(5, 1, batch=1), 0)
    assert other.shape == (1, 2, 505, 32)
    assert torch.equal(other.written()[:, :, :504], keys.written()[1:])
    cache.reset()
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(*new, 0)
    assert keys.shape == (2, 2, 3, 32)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rows", [40, 1])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"s_aux": (4,)}], ids=str)
def test_one_call(smooth: bool, rows: int, more: dict[str, Any]) -> None:
    """On the numbers of the codes, to rounding."""
    if "s_aux" in more:
        more = {"s_aux": torch.linspace(-1, 3, 4)}
    cache = adapter.QuantizedCache("int4", smooth_keys=smooth)
    keys, values = cache.update(*states(0, 40), 0)
    query = torch.randn(2, 4, rows, 32, generator=torch.Generator().manual_seed(5))
    run = transformers.AttentionInterface()["umfa"]
    module = torch.nn.Module()
    found, _ = run(module, query, keys, values, None, **more)
    expected, _ = run(module, query, keys.written(), values.written(), None, **more)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_notice_the_mean(family: str) -> None:
    ids, there = tokens()
    ids, there = ids[:, :12], there[:, :12]
    expected = logits(model_on("eager", family), adapter.QuantizedCache(), ids, there)
    found = logits(model_on("umfa", family), adapter.QuantizedCache(), ids, there)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)
    assert "keys without their mean (smooth_keys) have other softcaps" in str(umfa.stats())


def test_keys_without_their_mean_are_more_exact() -> None:
    """A channel that is large in all keys, as in trained models."""
    keys, values = states(0, 100)
    keys[..., 5] += 30
    errors = {}
    for smooth in (False, True):
        cache = adapter.QuantizedCache("int4", smooth_keys=smooth)
        parts = [
            cache.update(keys[..., a:b, :], values[..., a:b, :], 0) for a, b in ((0, 60), (60, 100))
        ]
        assert parts[1][0].shape == keys.shape
        errors[smooth] = float((parts[1][0].written() - keys).abs().mean())
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped, _ = cache.update(*states(1, 1), 0)
        assert torch.equal(swapped.written()[:, :, :100], parts[1][0].written().flip(0))
    assert errors[True] < errors[False] / 3


@pytest.mark.parametrize("smooth", [False, True])
def test_nan_stays_in_its_token(smooth: bool) -> None:
    cache = adapter.QuantizedCache(smooth_keys=smooth)
    keys, values = states(0, 5)
    keys[0, 1, 2, 3] = float("nan")
    found = cache.update(keys, values, 0)[0].written()
    assert torch.isnan(found[0, 1, 2]).all()
    assert torch.isnan(found).sum() == 32


@pytest.mark.parametrize(
    "form",
    [
        {"granularity": "tensor"},
        {"granularity": "channel"},
        {"granularity": "block", "block": (64, None)},
    ],
    ids=str,
)
def test_formats_whose_tokens_share_a_scale(form: dict[str, Any]) -> None:
    text = r"\[umfa\.transformers\.QuantizedCache\] tokens share a scale.*; got granularity="
    with pytest.raises(umfa.UnsupportedError, match=text):
        adapter.QuantizedCache("int8", **form)


def test_states_that_do_not_fit() -> None:
    cache = adapter.QuantizedCache()
    keys, values = states(0, 5)
    what = "value_states do not fit key_states"
    name = r"\[umfa\.transformers\.QuantizedCache\.update\] "
    for bad in (values[:, :, :4], values[:1], values[:, :1]):
        with pytest.raises(ValueError, match=f"{name}{what}"):
            cache.update(keys, bad, 0)
    for wrong in (None, keys[0]):
        with pytest.raises(ValueError, match=f"{name}key_states has the wrong shape"):
            cache.update(wrong, values, 0)
    assert cache.get_seq_length() == 0
    cache.update(keys, values, 0)
    for other in (states(1, 5, batch=1), (keys[..., :16], values)):
        with pytest.raises(ValueError, match=f"{name}the states do not fit those in the cache"):
            cache.update(*other, 0)
    assert cache.get_seq_length() == 5


def test_unknown_formats() -> None:
    with pytest.raises(umfa.UnsupportedError, match="q8_0"):
        adapter.QuantizedCache("q8_0")
    with pytest.raises((ValueError, umfa.UnsupportedError), match="block"):
        adapter.QuantizedCache("int8", "row", block=(1, 32))
    with pytest.raises(TypeError, match="smooth_keys is not a bool; got 'no'"):
        adapter.QuantizedCache(smooth_keys="no")
    with pytest.raises(ValueError, match=r"umfa\.transformers\.QuantizedCache\].*int7"):
        adapter.QuantizedCache("int7")
    with pytest.raises(TypeError, match="nbits"):
        adapter.QuantizedCache(nbits=4)


def test_a_crop_that_adds() -> None:
    cache = adapter.QuantizedCache()
    cache.update(*states(0, 5), 0)
    with pytest.raises(ValueError, match=r"QuantizedCache\.crop\] .*; got 3; expected 0 or less"):
        cache.crop(3)
    for bad in (None, "a", -1.5):
        with pytest.raises(TypeError, match=r"QuantizedCache\.crop\] tokens_to_remove"):
            cache.crop(bad)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
