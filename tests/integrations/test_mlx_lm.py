"""umfa under mlx-lm: `umfa.mlx_lm.enable`, with tiny models of random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests.gradients import compare

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
utils = pytest.importorskip("mlx.utils")
pytest.importorskip("mlx_lm")
adapter = pytest.importorskip("umfa.mlx_lm")
umfa_mlx = pytest.importorskip("umfa.mlx")
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import base, gemma3_text, gpt_oss, llama  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache  # noqa: E402

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

SDPA = "mlx.fast.scaled_dot_product_attention"
QUANTIZED = "mlx_lm.scaled_dot_product_attention"
STOCK = mx.fast.scaled_dot_product_attention, base.quantized_scaled_dot_product_attention
LAYERS, VOCABULARY = 2, 97
PROMPT = [5, 17, 3, 44, 80, 2, 9, 61, 33, 70, 12, 8]


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    mx.random.seed(3)
    yield
    adapter.disable()
    umfa_mlx.disable()
    found = mx.fast.scaled_dot_product_attention, base.quantized_scaled_dot_product_attention
    assert found == STOCK


COMMON = {
    "hidden_size": 64, "num_hidden_layers": LAYERS, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip


def plain_llama() -> Any:
    return llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **COMMON))


def wide_llama() -> Any:
    """Heads wide enough for a quantised cache."""
    more = {**COMMON, "head_dim": 64}
    return llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **more))


def sliding_llama() -> Any:
    """A window shorter than the prompt."""
    types = ["sliding_attention", "full_attention"]
    given = {**COMMON, "layer_types": types, "sliding_window": 5}
    return llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **given))


def gemma3() -> Any:
    given = {**COMMON, "sliding_window": 5, "sliding_window_pattern": 2, "head_dim": 16}
    return gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **given))


def gpt() -> Any:
    """With sinks, which are not 0 as they are at first."""
    given = {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    model = gpt_oss.Model(gpt_oss.ModelArgs(sliding_window=5, rope_theta=10000, **given))
    for layer in model.model.layers:
        layer.self_attn.sinks = mx.random.normal((4,))
    return model


MODELS = [plain_llama, sliding_llama, gemma3, gpt]


class Counted:
    """What a block of calls adds to the counters."""

    def __init__(self) -> None:
        self.before = umfa.stats()

    @property
    def taken(self) -> dict[str, int]:
        return dict(Counter(umfa.stats().taken) - Counter(self.before.taken))

    @property
    def left(self) -> dict[str, int]:
        def of(stats: umfa.Stats) -> Counter[str]:
            return Counter({f"{x.where}: {x.reason}": x.calls for x in stats.left})

        return dict(of(umfa.stats()) - of(self.before))


def tokens(model: Any, prompt: list[int] = PROMPT, count: int = 8, **options: Any) -> list[int]:
    """Greedily, by mlx-lm's own loop."""
    return [int(x) for x, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_says_what_it_said(make: Callable[[], Any]) -> None:
    model = make()
    stock = tokens(model)
    logits = model(mx.array([PROMPT]))
    mx.eval(logits)
    counted = Counted()
    adapter.enable()
    found = tokens(model)
    calls = counted.taken[SDPA]
    assert calls >= 8 * LAYERS  # the prompt, and then each token
    assert calls % LAYERS == 0
    assert counted.left == {}
    ours = model(mx.array([PROMPT]))
    adapter.disable()
    assert found == stock
    compare("logits", _numpy(ours), _numpy(logits), 1e-4)
    done = umfa.stats()
    assert tokens(model) == stock
    assert umfa.stats() == done


def _numpy(x: Any) -> Any:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def test_prompt_caches() -> None:
    """A conversation goes on with the keys of its beginning, in one piece or in parts."""
    model = plain_llama()
    runs = []
    for on in (False, True):
        (adapter.enable if on else adapter.disable)()
        cache = make_prompt_cache(model)
        said = tokens(model, prompt_cache=cache)
        said += tokens(model, [7, 7, 30], prompt_cache=cache, prefill_step_size=2)
        rotating = tokens(model, max_kv_size=6)
        runs.append((said, rotating, [layer.offset for layer in cache]))
    assert runs[0] == runs[1]


def test_batches_of_different_lengths() -> None:
    """mlx-lm pads them on the left, and masks the padding."""
    model = plain_llama()
    padded = mx.array([[0, 0, 0, *PROMPT[:4]], PROMPT[:7]])
    outputs = []
    counted = Counted()
    for on in (False, True):
        (adapter.enable if on else adapter.disable)()
        caches = [BatchKVCache([3, 0]) for _ in range(LAYERS)]
        outputs.append(_numpy(model(padded, cache=caches)))
    assert counted.taken == {SDPA: LAYERS}
    compare("logits", outputs[1][0, 3:], outputs[0][0, 3:], 1e-4)
    compare("logits", outputs[1][1], outputs[0][1], 1e-4)


def test_a_quantised_cache_is_counted() -> None:
    model = wide_llama()
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    stock = tokens(model, **options)
    counted = Counted()
    adapter.enable()
    assert tokens(model, **options) == stock
    ((reason, calls),) = counted.left.items()
    assert reason.startswith(f"{QUANTIZED}: the cache is quantised")
    assert calls >= 7 * LAYERS


def test_training() -> None:
    """Gradients of the weights; a step that mlx-lm compiles runs on MLX, counted."""
    model = plain_llama()
    x = mx.array([PROMPT])

    def loss(model: Any) -> Any:
        return nn.losses.cross_entropy(model(x)[:, :-1], x[:, 1:]).mean()

    run = nn.value_and_grad(model, loss)
    _, stock = run(model)
    counted = Counted()
    adapter.enable()
    _, found = run(model)
    mx.eval(found)
    assert counted.taken[SDPA] >= LAYERS
    assert not counted.left
    for (name, a), (_, b) in zip(_leaves(found), _leaves(stock), strict=True):
        compare(name, _numpy(a), _numpy(b), 1e-3)
    state = [model.state]
    step = mx.compile(lambda: run(model)[0], inputs=state, outputs=state)
    before = counted.taken[SDPA]
    assert abs(step().item() - loss(model).item()) < 1e-5
    assert counted.taken[SDPA] == before + LAYERS  # those of the loss beside it
    assert any("traced by mx.compile" in reason for reason in counted.left)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return list(utils.tree_flatten(tree))


def test_the_switch() -> None:
    """It holds beside that of umfa.mlx, and each takes back what is its own."""
    adapter.enable()
    adapter.enable()
    assert adapter.is_enabled()
    assert umfa_mlx.is_enabled()
    umfa_mlx.enable()
    adapter.disable()
    assert not adapter.is_enabled()
    assert umfa_mlx.is_enabled()
    assert base.quantized_scaled_dot_product_attention is STOCK[1]
    umfa_mlx.disable()
    assert not umfa_mlx.is_enabled()
