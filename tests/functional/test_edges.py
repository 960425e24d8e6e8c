"""What a stranger found at the edges of the Python surface, each as it was found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries, reference
from tests.array_libraries import Framework
from tests.cases import normal

X = np.zeros((1, 4, 2, 8), np.float32)


@pytest.fixture
def torch() -> Any:
    return array_libraries.load("torch").module


def refused(error: type[Exception], text: str, function: Any, *args: Any, **kwargs: Any) -> None:
    """The call, and `can_run` about it."""
    with pytest.raises(error, match=re.escape(text)) as caught:
        function(*args, **kwargs)
    assert str(caught.value).startswith(f"[umfa.{function.__name__}] ")
    possible, reason = umfa.can_run(function, *args, **kwargs)
    assert not possible
    assert text in reason


# ---- torch's special tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("corner", ["causal_upper_left", "causal_lower_right"])
def test_a_causal_bias_is_no_mask_of_numbers(corner: str, torch: Any) -> None:
    """By class it is a tensor; its memory was never written."""
    from torch.nn.attention import bias

    mask = getattr(bias, corner)(4, 4)
    x = torch.zeros(1, 4, 2, 8)
    angles = torch.ones(4, 4), torch.zeros(4, 4)
    for function, tensors in (
        (umfa.flash_attn_func, (x, x, x)),
        (umfa.flash_attn_with_kvcache, (x, x, x)),
        (umfa.fused_rope_attention, (x, x, x, *angles)),
    ):
        refused(
            umfa.UnsupportedError, "attn_mask is a causal bias", function, *tensors, attn_mask=mask
        )
    refused(
        umfa.UnsupportedError, "alibi_slopes is a causal bias", umfa.flash_attn_func, x, x, x,
        alibi_slopes=mask,
    )  # fmt: skip


def test_a_negated_cache_is_refused_before_anything_is_written(torch: Any) -> None:
    q, value = torch.randn(1, 1, 2, 16), torch.zeros(1, 9, 2, 16)
    key = torch.zeros(1, 9, 2, 16, dtype=torch.complex64).conj().imag
    assert key.is_neg()
    with pytest.raises(ValueError, match="k_cache cannot be written; got a lazily negated view"):
        umfa.flash_attn_with_kvcache(q, key, value, q, q, cache_seqlens=2)
    assert not value.any()


def test_autograd_notices_that_a_cache_was_written(torch: Any) -> None:
    weight = torch.randn(1, 8, 2, 8, requires_grad=True)
    key, value, q = torch.zeros(1, 8, 2, 8), torch.zeros(1, 8, 2, 8), torch.randn(1, 1, 2, 8)
    product = (weight * key).sum()
    umfa.flash_attn_with_kvcache(q, key, value, q, q, cache_seqlens=2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    version = key._version
    umfa.flash_attn_with_kvcache(q, key, value, cache_seqlens=2)  # reads only
    assert key._version == version


def test_a_cache_that_requires_grad_may_be_written_without_grad(torch: Any) -> None:
    key, value = (torch.zeros(1, 8, 2, 8, requires_grad=True) for _ in range(2))
    q = torch.ones(1, 1, 2, 8)
    with pytest.raises(umfa.UnsupportedError, match="it requires grad"):
        umfa.flash_attn_with_kvcache(q, key, value, q, q, cache_seqlens=2)
    assert not key.any()
    with torch.no_grad():
        umfa.flash_attn_with_kvcache(q, key, value, q, q, cache_seqlens=2)
    assert (key[:, 2] == 1).all()
    assert key.requires_grad
    assert key._version > 0


def test_fake_tensors_with_dropout(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.zeros(1, 4, 2, 8)
        assert umfa.flash_attn_func(x, x, x, 0.5).shape == x.shape
        assert umfa.scaled_dot_product_attention(x, x, x, dropout_p=0.5).shape == x.shape
        refused(
            umfa.UnsupportedError,
            "out_partial is being recorded",
            umfa.flash_attn_combine,
            x[None],
            x[None, ..., 0],
        )


@pytest.mark.filterwarnings("ignore:.*dropped at random outside training")
@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
def test_a_refused_call_leaves_the_generator_alone(framework: Framework) -> None:
    x = framework.tensor(X)

    def state() -> Any:
        if framework.name == "torch":
            return framework.module.get_rng_state().numpy()
        _, key, place, *_ = np.random.get_state()
        return np.append(key, place)

    before = state().copy()
    with pytest.raises(ValueError, match="seqlen differs"):
        umfa.flash_attn_func(x, x, x[:, :1], 0.5)
    assert np.array_equal(state(), before)
    umfa.flash_attn_func(x, x, x, 0.5)
    assert not np.array_equal(state(), before)


# ---- flash_attn_combine --------------------------------------------------------------------------

PARTS, LSE = normal((3, 1, 5, 2, 8), seed=1), normal((3, 1, 5, 2), seed=2)


@pytest.mark.parametrize("out", [np.zeros((1, 5, 2, 8), "i4"), np.zeros((1, 5, 2, 8), "f8")])
def test_results_of_no_attention_dtype(out: Any) -> None:
    with pytest.raises((TypeError, umfa.UnsupportedError), match=f"out has the wrong.*{out.dtype}"):
        umfa.flash_attn_combine(PARTS, LSE, out)
    assert not out.any()


@pytest.mark.parametrize(
    "dtype", [np.int32, bool, str, "nonsense", 5, np.complex64, "float8_e4m3fn", np.float64]
)
def test_out_dtypes_that_are_none(dtype: Any) -> None:
    refused(TypeError, "out_dtype is wrong", umfa.flash_attn_combine, PARTS, LSE, None, dtype)


def test_out_dtype_in_any_spelling(framework: Framework) -> None:
    ours = framework.tensor(PARTS), framework.tensor(LSE)
    own = framework.tensor(PARTS.astype(np.float16)).dtype
    for dtype in ("float16", np.float16, np.dtype(np.float16), own):
        out, _ = umfa.flash_attn_combine(*ours, out_dtype=dtype)
        assert framework.dtype_name(out) == "float16"


def test_outs_that_cannot_hold_a_result(torch: Any) -> None:
    memory = np.zeros(8, np.float32)
    overlapping = np.lib.stride_tricks.as_strided(memory, (1, 5, 2, 8), (0, 0, 0, 4))
    masked = np.ma.masked_array(np.zeros((1, 5, 2, 8), "f4"), mask=True)
    for out, error, text in (
        (overlapping, ValueError, "out has elements that share memory"),
        (masked, TypeError, "out is a masked array"),
    ):
        refused(error, text, umfa.flash_attn_combine, PARTS, LSE, out)
    parts, lse = torch.from_numpy(PARTS), torch.from_numpy(LSE)
    with torch.inference_mode():
        inference = torch.zeros(1, 5, 2, 8)
    for out, error, text in (
        (torch.zeros(1, 5, 2, 8, device="meta"), ValueError, "out has no data"),
        (torch.zeros(1).expand(1, 5, 2, 8), ValueError, "out has elements that share memory"),
        (torch.zeros(1, 5, 2, 8, requires_grad=True), umfa.UnsupportedError, "it requires grad"),
        (inference, umfa.UnsupportedError, "it is an inference tensor"),
    ):
        refused(error, text, umfa.flash_attn_combine, parts, lse, out)


def test_parts_of_half_precision_are_rounded_once(framework: Framework) -> None:
    parts = PARTS.astype(np.float16)
    ours = framework.tensor(parts), framework.tensor(LSE)
    kind = framework.tensor(PARTS).dtype
    out = framework.float64(umfa.flash_attn_combine(*ours, out_dtype=kind)[0])
    exact, _ = reference.combine(parts, LSE)
    assert abs(out - exact).max() < 2e-6


@pytest.mark.parametrize("shift", [1e2, 1e4, 1e5, -1e5])
def test_large_log_sum_exps_lose_nothing(shift: float, framework: Framework) -> None:
    shifted = (LSE + np.float32(shift)).astype(np.float32)
    out, lse = umfa.flash_attn_combine(framework.tensor(PARTS), framework.tensor(shifted))
    exact, exact_lse = reference.combine(PARTS, shifted)
    assert abs(framework.float64(out) - exact).max() < 2e-6
    assert np.allclose(framework.float64(lse), exact_lse, rtol=1e-7, atol=1e-6)


def test_one_part_keeps_its_bits(framework: Framework) -> None:
    one = umfa.flash_attn_combine(framework.tensor(PARTS[:1]), framework.tensor(LSE[:1]))
    assert np.array_equal(framework.numpy(one[1]), LSE[0])


def test_names_are_the_callers(torch: Any) -> None:
    refused(
        umfa.UnsupportedError, "out_partial has the wrong dtype; got float64",
        umfa.flash_attn_combine, PARTS.astype(np.float64), LSE,
    )  # fmt: skip
    lse = torch.from_numpy(LSE).requires_grad_()
    refused(
        umfa.UnsupportedError, "lse_partial requires grad", umfa.flash_attn_combine,
        torch.from_numpy(PARTS), lse,
    )  # fmt: skip


@pytest.mark.parametrize("framework", ["jax"], indirect=True)
def test_traced_parts(framework: Framework) -> None:
    import jax

    def body(parts: Any, lse: Any) -> Any:
        assert not umfa.can_run(umfa.flash_attn_combine, parts, lse)[0]
        return umfa.flash_attn_combine(parts, lse)[0]

    with pytest.raises(umfa.UnsupportedError, match="out_partial is being traced"):
        jax.jit(body)(framework.tensor(PARTS), framework.tensor(LSE))


# ---- the others ----------------------------------------------------------------------------------


def test_rope_without_angles() -> None:
    angles = np.ones((4, 4), np.float32)
    for cos, sin, name in ((None, None, "rotary_cos"), (angles, None, "rotary_sin")):
        refused(TypeError, f"{name} is missing", umfa.fused_rope_attention, X, X, X, cos, sin)


def test_a_mask_beyond_the_cache_fits_however_its_length_is_given() -> None:
    q, cache = normal((2, 3, 2, 8), seed=1), normal((2, 30, 2, 8), seed=2)
    mask = np.random.default_rng(1).random((2, 1, 3, 40)) < 0.5
    without = umfa.flash_attn_with_kvcache(q, cache, cache, attn_mask=mask)
    given = umfa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=30, attn_mask=mask)
    assert np.array_equal(without, given)


@pytest.mark.parametrize("name", ["qv", "alibi_slopes", "attn_mask", "learnable_sink"])
def test_what_is_read_may_not_lie_in_a_cache_that_is_written(name: str) -> None:
    cache = np.zeros((1, 9, 2, 8), np.float32)
    inside = {
        "qv": cache[:, :1],
        "alibi_slopes": cache[0, 0, :, 0],
        "attn_mask": cache[0, 0, 0, :1],
        "learnable_sink": cache[0, 0, :, 0],
    }[name]
    refused(
        ValueError, f"k_cache overlaps {name} in memory", umfa.flash_attn_with_kvcache,
        X[:, :1], cache, np.zeros_like(cache), X[:, :1], X[:, :1], cache_seqlens=3,
        **{name: inside},
    )  # fmt: skip
    assert not cache.any()


def test_weights_too_small_for_half_precision_keep_their_sign() -> None:
    q, k = (normal((1, n, 1, 64), "float16", seed=i, factor=4) for i, n in ((1, 4), (2, 600)))
    half = umfa.flash_attn_func(q, k, k, 0.5, return_attn_probs=True, dropout_seed=1)[2]
    wide = [x.astype(np.float32) for x in (q, k, k)]
    full = umfa.flash_attn_func(*wide, 0.5, return_attn_probs=True, dropout_seed=1)[2]
    assert (np.signbit(half) == np.signbit(full)).all()
    assert 0.4 < np.signbit(half).mean() < 0.6
    causal = umfa.flash_attn_func(X, X, X, 0.5, causal=True, return_attn_probs=True, dropout_seed=1)
    assert not np.signbit(causal[2][np.triu_indices(4, 1)[0][0], :, 0, 1:]).any()


@pytest.mark.parametrize("arguments", [(), (X,), (umfa.flash_attn_with_kvcache, X)])
def test_can_run_about_a_call_that_does_not_fit(arguments: Any) -> None:
    possible, reason = umfa.can_run(*arguments)
    assert not possible
    assert reason.startswith("[umfa.can_run] the arguments do not fit; got missing a required arg")
    reason = umfa.can_run(umfa.flash_attn_with_kvcache, X, X, X, dropout_p=0.1)[1]
    assert "; got an unexpected keyword argument 'dropout_p'; expected" in reason
    reason = umfa.can_run(umfa.flash_attn_func, X, X, X, causal=True, nope=1)[1]
    assert reason == (
        "[umfa.can_run] the arguments do not fit; got an unexpected keyword argument 'nope'; "
        "expected those of flash_attn_func"
    )


@pytest.mark.parametrize("name", ["dropout_seed", "dropout_offset", "attention_chunk", "softcap"])
def test_numbers_of_thousands_of_digits(name: str) -> None:
    text = "got an integer of 16610 bits"
    refused(ValueError, text, umfa.flash_attn_func, X, X, X, **{name: 10**5000})
