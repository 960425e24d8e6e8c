"""torch.autocast: tensors are cast, computed and returned as PyTorch's own attention does it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import umfa
from tests import checks, reference
from tests.cases import normal

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
HALVES = pytest.mark.parametrize("half", [BF16, F16], ids=str)


def given(seed: int, *shape: int, dtype: Any = F32) -> Any:
    return torch.from_numpy(normal(shape, seed=seed)).to(dtype)


def autocast(half: Any, device: str = "cpu", **options: Any) -> Any:
    return torch.autocast(device, dtype=half, **options)


def cast(tensors: dict[str, Any], half: Any, kept: frozenset[str]) -> dict[str, Any]:
    """What autocast is to make of the arguments."""
    floats = (F32, F16, BF16)
    return {
        name: x.to(half) if name not in kept and x.dtype in floats else x
        for name, x in tensors.items()
    }


KEPT = frozenset(
    ("alibi_slopes", "learnable_sink", "rotary_cos", "rotary_sin", "out_partial", "lse_partial")
)


def calls() -> Iterator[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]:
    """(function, tensors, options) of every function that computes."""
    q, k, v = given(0, 2, 5, 4, 16), given(1, 2, 9, 2, 16), given(2, 2, 9, 2, 16)
    starts = {f"cu_seqlens_{x}": torch.tensor([0, 3, 5], dtype=torch.int32) for x in "qk"}
    lengths = {"max_seqlen_q": 5, "max_seqlen_k": 5}
    angles = given(6, 9, 8)
    turn = {"rotary_cos": torch.cos(angles), "rotary_sin": torch.sin(angles)}
    yield umfa.flash_attn_func, {"q": q, "k": k, "v": v}, {}
    yield (
        umfa.flash_attn_func,
        {
            "q": q, "k": k, "v": v, "attn_mask": given(3, 1, 4, 5, 9), "qv": given(4, 2, 5, 4, 16),
            "alibi_slopes": torch.full((4,), 0.1), "learnable_sink": given(5, 4),
        },
        {"return_lse": True},
    )  # fmt: skip
    dropped = {"dropout_p": 0.5, "dropout_seed": 3, "return_attn_probs": True}
    yield umfa.flash_attn_func, {"q": q, "k": k, "v": v}, dropped
    yield umfa.flash_attn_qkvpacked_func, {"qkv": given(0, 2, 5, 3, 4, 16)}, {}
    yield umfa.flash_attn_kvpacked_func, {"q": q, "kv": given(1, 2, 9, 2, 2, 16)}, {}
    yield umfa.flash_attn_varlen_func, {"q": q[0], "k": k[0], "v": v[0], **starts}, lengths
    yield (
        umfa.flash_attn_varlen_qkvpacked_func,
        {"qkv": given(0, 5, 3, 4, 16), "cu_seqlens": starts["cu_seqlens_q"]},
        {"max_seqlen": 5},
    )
    yield (
        umfa.flash_attn_varlen_kvpacked_func,
        {"q": q[0], "kv": given(0, 5, 2, 4, 16), **starts},
        lengths,
    )
    yield umfa.flash_attn_with_kvcache, {"q": q, "k_cache": k, "v_cache": v}, {"cache_seqlens": 7}
    yield umfa.fused_rope_attention, {"q": q, "k": k, "v": v, **turn}, {"return_lse": True}
    yield umfa.scaled_dot_product_attention, {
        "query": given(0, 2, 4, 5, 16), "key": given(1, 4, 9, 16), "value": given(2, 4, 9, 16),
        "attn_mask": given(3, 5, 9),
    }, {}  # fmt: skip
    yield (
        umfa.flash_attn_combine,
        {"out_partial": given(0, 3, 2, 5, 4, 16), "lse_partial": given(1, 3, 2, 5, 4)},
        {},
    )


CALLS = list(calls())
LABELS = [f"{function.__name__}-{i}" for i, (function, _, _) in enumerate(CALLS)]


@HALVES
@pytest.mark.parametrize("call", CALLS, ids=LABELS)
def test_inputs_are_cast(call: Any, half: Any) -> None:
    function, tensors, options = call
    before = {name: x.clone() for name, x in tensors.items()}
    wanted = function(**cast(tensors, half, KEPT), **options)
    with autocast(half):
        assert umfa.can_run(function, **tensors, **options) == (True, "")
        found = function(**tensors, **options)
    plain = function(**tensors, **options)  # autocast is over
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted, plain)), strict=True)
    for i, (one, other, without) in enumerate(pairs):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        # The log-sum-exp, and partial results that are merged, stay what they are.
        stays = i == 1 or function is umfa.flash_attn_combine
        assert one.dtype == (F32 if stays else half)
        assert without.dtype == F32
        assert stays or not torch.equal(one.float(), without), "nothing was cast"
    for name, x in tensors.items():
        assert torch.equal(x, before[name])


@HALVES
def test_the_numbers_are_those_of_the_reference(half: Any) -> None:
    q, k, v = (given(i, 1, 7, 2, 16) for i in range(3))
    with autocast(half):
        out, lse = umfa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    rounded = (x.to(half).double().numpy() for x in (q, k, v))
    expected, expected_lse = reference.attention(*rounded, causal=True)
    name = str(half).removeprefix("torch.")
    checks.assert_close(out.double().numpy(), expected, checks.BASE[name])
    checks.assert_close(lse.numpy(), expected_lse, checks.LSE)


MASKS = [None, torch.bool, F32, F16, BF16]


@HALVES
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_dtype_is_cast_as_torch_casts_it(half: Any, mask: Any) -> None:
    shape = (1, 2, 6, 16)
    attn_mask = None if mask is None else given(3, 6, 6)
    if attn_mask is not None:
        attn_mask = attn_mask > -1 if mask is torch.bool else attn_mask.to(mask)
    for dtypes in itertools.product((F32, F16, BF16), repeat=3):
        tensors = [given(i, *shape, dtype=dtype) for i, dtype in enumerate(dtypes)]
        with autocast(half):
            wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask)
            assert umfa.can_run(
                umfa.scaled_dot_product_attention, *tensors, attn_mask
            ) == (True, "")  # fmt: skip
            found = umfa.scaled_dot_product_attention(*tensors, attn_mask)
        assert found.dtype == wanted.dtype == half
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
        outside = umfa.scaled_dot_product_attention(*tensors, attn_mask)  # keeps their dtypes
        assert outside.dtype == dtypes[0]


def test_float64_is_not_cast() -> None:
    x = given(0, 1, 2, 6, 16, dtype=F64)
    with autocast(BF16):
        assert torch.nn.functional.scaled_dot_product_attention(x, x, x).dtype == F64
        with pytest.raises(umfa.UnsupportedError, match="wrong dtype; got float64"):
            umfa.scaled_dot_product_attention(x, x, x)
        with pytest.raises((TypeError, umfa.UnsupportedError), match="float64"):
            umfa.scaled_dot_product_attention(x.float(), x.float(), x)


def test_float8_is_not_cast() -> None:
    x = given(0, 1, 2, 6, 16).to(torch.float8_e4m3fn)
    with autocast(BF16), pytest.raises(umfa.UnsupportedError, match="got float8_e4m3fn"):
        umfa.scaled_dot_product_attention(x, x, x)


def test_where_autocast_applies() -> None:
    x = given(0, 1, 6, 2, 16)

    def dtype() -> Any:
        return umfa.flash_attn_func(x, x, x).dtype

    with autocast(BF16, enabled=False):
        assert dtype() == F32
    with autocast(F16, "mps"):
        assert torch.is_autocast_enabled("mps")
        assert dtype() == F32
    with autocast(BF16):
        with autocast(F16):
            assert dtype() == F16
        assert dtype() == BF16
        with autocast(BF16, enabled=False):
            assert dtype() == F32
        with autocast(F16, "mps"):
            assert dtype() == BF16
        array = x.numpy()
        assert umfa.flash_attn_func(array, array, array).dtype == np.float32
    assert dtype() == F32


def test_the_context_of_another_device_is_asked_for_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from umfa._frameworks import _torch

    asked = []

    class OnMps:
        is_cpu = False

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: asked.append(device))
    _torch.autocast("umfa.f", {"q": OnMps()}, (), ("q",))
    assert asked == ["mps"]


def test_what_is_expanded_stays_so() -> None:
    from umfa._frameworks import _torch

    mask = given(0, 1, 1, 1, 9).expand(3, 4, 5, 9)
    tensors = {"q": given(1, 3, 5, 4, 16), "k": given(2, 1, 9, 1, 16).expand(3, 9, 4, 16)}
    tensors |= {"v": tensors["k"], "attn_mask": mask}
    with autocast(BF16):
        found = dict(tensors)
        _torch.autocast("umfa.f", found, (), tuple(found))
        out = umfa.flash_attn_func(**tensors)
    assert found["attn_mask"].untyped_storage().nbytes() == 9 * 2
    assert found["k"].untyped_storage().nbytes() == 9 * 16 * 2
    for name, x in tensors.items():
        assert torch.equal(found[name], x.to(BF16))
    assert torch.equal(out, umfa.flash_attn_func(**cast(tensors, BF16, frozenset())))


# ---- caches, gradients, tensors that are refused -------------------------------------------------


def append(cache: Any, half: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = {name: given(i, 1, 2, 2, 16) for i, name in enumerate("qkv")}
    caches = {
        name: given(i, 1, 8, 2, 16, dtype=cache) for i, name in enumerate(("k_cache", "v_cache"))
    }
    return tensors, caches


@HALVES
def test_new_rows_are_cast_to_the_caches_dtype(half: Any) -> None:
    tensors, caches = append(half, half)
    others = {name: x.clone() for name, x in caches.items()}
    with autocast(half):
        found = umfa.flash_attn_with_kvcache(**tensors, **caches, cache_seqlens=3)
    tensors = {name: x.to(half) for name, x in tensors.items()}
    wanted = umfa.flash_attn_with_kvcache(**tensors, **others, cache_seqlens=3)
    assert found.dtype == half
    assert torch.equal(found, wanted)
    for name, x in caches.items():
        assert torch.equal(x, others[name])
    assert torch.equal(caches["k_cache"][:, 3:5], tensors["k"])


@pytest.mark.parametrize(("cache", "half"), [(F32, BF16), (F32, F16), (F16, BF16), (BF16, F16)])
@pytest.mark.parametrize("other", ["k_cache", "v_cache"])
def test_a_cache_that_is_written_keeps_its_dtype(cache: Any, half: Any, other: str) -> None:
    tensors, caches = append(half, half)
    caches[other] = caches[other].to(cache)
    others = {name: x.clone() for name, x in caches.items()}
    with autocast(half):
        found = umfa.flash_attn_with_kvcache(**tensors, **caches, cache_seqlens=3)
    tensors = {name: x.to(half) for name, x in tensors.items()}
    wanted = umfa.flash_attn_with_kvcache(**tensors, **others, cache_seqlens=3)
    assert found.dtype == half
    assert torch.equal(found, wanted)
    assert caches[other].dtype == cache
    for name, x in caches.items():
        assert torch.equal(x, others[name])


def test_out_dtype_is_that_of_the_result() -> None:
    x = torch.randn(1, 4, 2, 8)
    with autocast(BF16):
        assert umfa.flash_attn_func(x, x, x, out_dtype=F32).dtype == F32
        assert umfa.flash_attn_func(x, x, x).dtype == BF16


def test_parameters_are_cast() -> None:
    x = torch.nn.Parameter(given(0, 1, 4, 2, 16))
    with autocast(BF16):
        assert umfa.flash_attn_func(x, x, x).dtype == BF16
        assert umfa.can_run(x, x, x) == (True, "")
        with torch.no_grad():
            assert umfa.flash_attn_func(x, x, x).dtype == BF16
        with torch.inference_mode():
            assert umfa.flash_attn_func(x, x, x).dtype == BF16


@pytest.mark.parametrize("name", ["q", "attn_mask"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.strided), "is a nested tensor"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "is a nested tensor"),
        (lambda x: x.to_sparse(), "is not a dense tensor"),
        (lambda x: x.to_mkldnn(), "is not a dense tensor"),
        (lambda x: x.to("meta"), "has no data"),
    ],
    ids=["nested", "jagged", "sparse", "mkldnn", "meta"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_dense_tensor_is_refused_before_it_is_cast(
    name: str, change: Any, text: str
) -> None:
    tensors = {x: given(0, 2, 4, 2, 16) for x in "qkv"} | {"attn_mask": given(1, 2, 1, 4, 4)}
    tensors[name] = change(tensors[name])
    with autocast(BF16):
        with pytest.raises((ValueError, umfa.UnsupportedError)) as caught:
            umfa.flash_attn_func(**tensors)
        assert not umfa.can_run(**tensors)[0]
    assert str(caught.value).startswith(f"[umfa.flash_attn_func] {name} {text}; got ")
