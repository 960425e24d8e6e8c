"""`umfa.shim.metal_sdpa_extension`: SimpleTuner's start-up checks, with "mps" read as "cpu"."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umfa
import umfa.shim
from tests import reference
from tests.checks import BASE, assert_close

torch = pytest.importorskip("torch")
umfa_torch = pytest.importorskip("umfa.torch")
F = torch.nn.functional

NAMES = ("metal_sdpa_extension", "pytorch_custom_op_ffi")
TOLERANCE = {"float32": (1e-4, 1e-3), "float16": (5e-2, 5e-2), "bfloat16": (5e-2, 5e-2)}
"""SimpleTuner's for results, and for gradients."""


@pytest.fixture
def extension() -> Iterator[Any]:
    with umfa.shim.metal_sdpa_extension():
        module = importlib.import_module("metal_sdpa_extension")
        module.reset_dispatch_stats()
        yield module


def draw(*shape: int, dtype: str = "float32", seed: int = 42, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, **options).to(getattr(torch, dtype))


def three(shape: tuple[int, ...], dtype: str = "float32", grad: bool = False) -> list[Any]:
    return [draw(*shape, dtype=dtype, seed=i).requires_grad_(grad) for i in range(3)]


def plain(query: Any, key: Any, value: Any, causal: bool = False) -> Any:
    """Attention by matrix products, in float64."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ value


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_results(extension: Any, dtype: str, causal: bool, scale: float) -> None:
    given = three((1, 4, 64, 64), dtype)
    out = extension.metal_flash_attention_autograd(*given, causal, scale)
    assert out.dtype == given[0].dtype
    wide = [x.double() for x in given]
    wide[0] = wide[0] * (scale * 8 if scale else 1)
    limit, _ = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), plain(*wide, causal), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients(extension: Any, dtype: str) -> None:
    given = three((1, 4, 64, 64), dtype, grad=True)
    out = extension.metal_flash_attention_autograd(*given, False, 0.0)
    assert out.grad_fn is not None
    out.square().mean().backward()
    wide = [x.detach().double().requires_grad_() for x in given]
    plain(*wide).square().mean().backward()
    _, limit = TOLERANCE[dtype]
    for ours, theirs in zip(given, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=limit, atol=limit)
        assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 24, 512, 128), (1, 4, 512, 128), (1, 4, 1024, 128)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "produced"])
def test_large_shapes(extension: Any, shape: tuple[int, ...], kind: str) -> None:
    given = three(shape)
    if kind == "transposed":
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    if kind == "produced":
        given = [x.mul(1.0) for x in given]
    out = extension.metal_flash_attention_autograd(*given, False, 0.0)
    assert out.shape == shape
    torch.testing.assert_close(out, plain(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("grad", "route"), [(False, "fp32_instream"), (True, "fp32_autograd")], ids=["", "grad"]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_routes_are_counted(
    extension: Any, grad: bool, route: str, causal: bool, direct: bool
) -> None:
    given = three((1, 4, 64, 64), grad=grad)
    before = umfa.stats()
    if direct:
        out = extension.metal_flash_attention_autograd(*given, causal, 0.0)
    else:
        out = F.scaled_dot_product_attention(*given, is_causal=causal)
    if grad:
        out.square().mean().backward()
    counts = extension.get_dispatch_stats()
    assert {x: n for x, n in counts.items() if n} == {"total": 1, route: 1}
    assert counts["pytorch_fallback"] == 0
    direct_name = "metal_sdpa_extension.metal_flash_attention_autograd"
    name = direct_name if direct else "torch.scaled_dot_product_attention"
    assert Counter(umfa.stats().taken) - Counter(before.taken) == {name: 1}
    extension.reset_dispatch_stats()
    assert not any(extension.get_dispatch_stats().values())


def test_masks_of_keys_are_not_left_to_torch(extension: Any) -> None:
    q, k, v = three((1, 4, 64, 32), grad=True)
    for mask in (
        torch.ones(1, 1, 1, 64, dtype=torch.bool),
        torch.arange(64).lt(63).view(1, 1, 1, 64),
        torch.where(torch.arange(64) < 63, 0.0, float("-inf")).view(1, 1, 1, 64),
    ):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().mean().backward()
    counts = extension.get_dispatch_stats()
    assert (counts["fp32_autograd"], counts["pytorch_fallback"]) == (3, 0)


def test_what_is_left_to_torch_is_counted(extension: Any) -> None:
    q = draw(1, 2, 8, 16).double()
    F.scaled_dot_product_attention(q, q, q)
    counts = extension.get_dispatch_stats()
    assert {x: n for x, n in counts.items() if n} == {"total": 1, "pytorch_fallback": 1}


def test_nothing_is_counted_after_the_end() -> None:
    with umfa.shim.metal_sdpa_extension() as shim:
        module = importlib.import_module("metal_sdpa_extension")
        module.reset_dispatch_stats()
    assert "removed" in repr(shim)
    with umfa_torch.sdpa():
        F.scaled_dot_product_attention(*three((1, 2, 8, 16)))
    assert module.get_dispatch_stats()["total"] == 0


# ---- rotary embedding ----------------------------------------------------------------------------


def angles(*leading: int, rows: int, channels: int, seed: int = 7) -> tuple[Any, Any]:
    """Pair-duplicated tables."""
    found = draw(*leading, rows, channels // 2, seed=seed).repeat_interleave(2, -1)
    return found.cos(), found.sin()


def turned(x: Any, cos: Any, sin: Any) -> Any:
    """Pairs of channels as complex numbers, times those of the angles."""
    factors = torch.complex(cos[..., ::2], sin[..., ::2]).to(torch.complex128)
    if factors.ndim == 3:
        factors = factors[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2)


@pytest.mark.parametrize("leading", [(), (1,), (2,)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "numbers"])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_rope(
    extension: Any, leading: tuple[int, ...], causal: bool, mask: str | None, heads_kv: int
) -> None:
    q = draw(2, 9, 4, 16, seed=1).transpose(1, 2).requires_grad_()
    k, v = (draw(2, heads_kv, 9, 16, seed=i).requires_grad_() for i in (2, 3))
    cos, sin = angles(*leading, rows=9, channels=16)
    attn_mask = None
    if mask is not None:
        attn_mask = draw(2, 1, 9, 9, seed=5)
        attn_mask = attn_mask > -1 if mask == "bool" else attn_mask
        if mask == "bool":
            attn_mask |= torch.eye(9, dtype=torch.bool)
    out = extension.rope_scaled_dot_product_attention(
        q, k, v, cos, sin, attn_mask, causal, scale=0.4
    )
    assert out.grad_fn is not None
    upstream = draw(*out.shape, seed=6)
    out.backward(upstream)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    shared = [x.repeat_interleave(4 // heads_kv, 1) for x in wide[1:]]
    scores = turned(wide[0], cos, sin) @ turned(shared[0], cos, sin).transpose(-2, -1) * 0.4
    if mask == "bool":
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif mask == "numbers":
        scores = scores + attn_mask
    if causal:
        scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    expected = torch.softmax(scores, -1) @ shared[1]
    expected.backward(upstream.double())
    assert_close(out.detach().numpy(), expected.detach().numpy(), BASE["float32"])
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert_close(ours.grad.numpy(), theirs.grad.numpy(), BASE["float32"], "gradient")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("leading", [(), (2,)], ids=str)
def test_rope_of_narrow_dtypes_is_rotation_and_rounding(
    extension: Any, dtype: str, leading: tuple[int, ...]
) -> None:
    q, k, v = (draw(2, 2, 9, 16, dtype=dtype, seed=i) for i in range(3))
    cos, sin = angles(*leading, rows=9, channels=16)
    out = extension.rope_scaled_dot_product_attention(q, k, v, cos.half(), sin.half())
    assert out.dtype == q.dtype
    rotated = [turned(x, cos.half().float(), sin.half().float()).to(x.dtype) for x in (q, k)]
    expected = reference.scaled_dot_product(*(x.float().numpy() for x in (*rotated, v)))
    assert_close(out.float().numpy(), expected.astype(np.float32), BASE[dtype])
    assert extension.get_dispatch_stats()["rope_instream"] == 1


def test_rope_in_a_graph(extension: Any) -> None:
    q, k, v = three((2, 2, 9, 16), grad=True)
    tables = angles(rows=9, channels=16)
    eager = extension.rope_scaled_dot_product_attention(q, k, v, *tables)
    function = torch.compile(
        extension.rope_scaled_dot_product_attention, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(function(q, k, v, *tables), eager, rtol=1e-5, atol=1e-5)


def test_wrong_tables_are_refused(extension: Any) -> None:
    q, k, v = three((2, 2, 9, 16))
    cos, sin = angles(rows=9, channels=16)
    function = extension.rope_scaled_dot_product_attention
    for wrong in (cos[:8], cos[:, :8], cos[None].expand(3, 9, 16), cos[0]):
        with pytest.raises(ValueError, match=r"^\[umfa\.shim\..*rope_cos has the wrong shape; got"):
            function(q, k, v, wrong, sin)
    with pytest.raises(ValueError, match="the channels of a pair differ in rope_sin"):
        function(q, k, v, cos, draw(9, 16))
    with pytest.raises(ValueError, match="key has another length"):
        function(q, k[:, :, :8], v[:, :, :8], cos, sin)
    with pytest.raises(ValueError, match="query has the wrong shape"):
        function(q[0], k, v, cos, sin)
    with pytest.raises(ValueError, match=r"key has the wrong shape; got \(9, 16\)"):
        function(q, k[0, 0], v, cos, sin)
    with pytest.raises(ValueError, match=r"value has the wrong shape; got \(2, 9, 16\)"):
        function(q, k, v[0], cos, sin)


# ---- the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64, 1024])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hadamard(extension: Any, size: int, dtype: str) -> None:
    x = draw(3, 2048, dtype=dtype)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    expected = x.double().numpy().reshape(3, -1, size) @ matrix / np.sqrt(size)
    kept = x.clone()
    assert extension.hadamard_rotate(x, size) is x
    assert_close(x.double().numpy(), expected.reshape(3, 2048), BASE[dtype])
    extension.hadamard_rotate(x, size)
    limit = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    torch.testing.assert_close(x, kept, rtol=limit, atol=limit)


def test_hadamard_refuses(extension: Any) -> None:
    x = torch.ones(4, 96)
    for size in (0, -2, 3, 2048):
        with pytest.raises(ValueError, match="block_size is no such number"):
            extension.hadamard_rotate(x, size)
    with pytest.raises(ValueError, match="x has no whole blocks"):
        extension.hadamard_rotate(x)
    with pytest.raises(TypeError, match="x has the wrong dtype"):
        extension.hadamard_rotate(x.int(), 32)
    assert torch.equal(x, torch.ones(4, 96))


def test_indexer_scores(extension: Any) -> None:
    q, k = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1)
    found = extension.sparse_indexer_scores(q, k, 0.5)
    expected = np.einsum("bhid,bhjd->bhij", q.double(), k.double()) * 0.5
    assert_close(found.numpy(), expected, BASE["float32"])


def test_version_and_device(extension: Any) -> None:
    assert ".".join(map(str, extension.get_version())) == umfa.__version__
    metal = next(x for x in umfa.backends() if x.name == "metal")
    assert extension.is_metal_available() is metal.available
    package = importlib.import_module("pytorch_custom_op_ffi")
    assert package.is_metal_sdpa_available() is metal.available
    assert package.metal_sdpa_version() == extension.get_version()


# ---- quantised -----------------------------------------------------------------------------------

PRECISIONS = {3: ("int8", 0.05), 4: ("int4", 0.5)}
"""SimpleTuner's limits."""


def small(length: int, heads: int = 4) -> list[Any]:
    return [(0.05 * draw(1, heads, length, 32, seed=i)).requires_grad_() for i in range(3)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("heads", [4, 8])
def test_quantised(extension: Any, precision: int, mode: int, heads: int) -> None:
    assert (extension.QUANT_INT8, extension.QUANT_INT4) == (3, 4)
    names = ("QUANT_TENSOR_WISE", "QUANT_ROW_WISE", "QUANT_BLOCK_WISE")
    assert [getattr(extension, name) for name in names] == [0, 1, 2]
    q, k, v = small(64, heads)
    run = extension.metal_quantized_flash_attention_autograd
    out = run(q, k, v, False, 0.0, precision, mode)
    assert (out.dtype, out.shape) == (torch.float32, q.shape)
    assert out.grad_fn is not None
    error = (out - plain(q, k, v)).abs().max()
    assert 0 < error < PRECISIONS[precision][1]
    out.square().sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0
    assert extension.get_dispatch_stats()["quantized_autograd"] == 1
    assert extension.get_dispatch_stats()["total"] == 1


def test_quantised_lengths_follow_each_other(extension: Any) -> None:
    for length in (512, 1024):
        given = small(length)
        out = extension.metal_quantized_flash_attention_autograd(*given, True, 0.3, 3, 2)
        assert (out - plain(given[0] * 0.3 * 32**0.5, *given[1:], causal=True)).abs().max() < 1e-3


@pytest.mark.parametrize("numbers", [False, True])
def test_quantised_masks(extension: Any, numbers: bool) -> None:
    q, k, v = small(64)
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    mask[..., 40:] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if numbers else mask
    run = extension.metal_quantized_flash_attention_autograd
    out = run(q, k, v, False, 0.0, extension.QUANT_INT8, extension.QUANT_BLOCK_WISE, given)
    assert (out - plain(q, k[..., :40, :], v[..., :40, :])).abs().max() < 1e-3
    out.sum().backward()
    assert (k.grad[..., 40:, :] == 0).all()
    assert (v.grad[..., 40:, :] == 0).all()


def test_the_mode_of_torchs_attention(extension: Any) -> None:
    given = small(64)
    direct = extension.metal_quantized_flash_attention_autograd(*given, True, 0.0, 4, 1)
    stock = F.scaled_dot_product_attention(*given, is_causal=True)
    extension.set_quantization_mode(extension.QUANT_INT4, extension.QUANT_ROW_WISE)
    try:
        found = F.scaled_dot_product_attention(*given, is_causal=True)
        assert torch.equal(found, direct)
        assert not torch.equal(found, stock)
        found.sum().backward()
        with torch.inference_mode():
            assert torch.equal(F.scaled_dot_product_attention(*given, is_causal=True), direct)
        counts = extension.get_dispatch_stats()
        assert (counts["quantized_autograd"], counts["fp32_autograd"]) == (3, 1)
        assert (counts["total"], counts["pytorch_fallback"]) == (4, 0)

        F.scaled_dot_product_attention(*given, dropout_p=0.5)
        assert extension.get_dispatch_stats()["pytorch_fallback"] == 1
        reasons = str(umfa.stats())
        assert "scaled_dot_product_attention, quantised" in reasons
        assert "quantised attention drops no weights; got dropout_p=0.5" in reasons
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            F.scaled_dot_product_attention(*given)
        F.scaled_dot_product_attention(given[0], *(x[:, :1] for x in given[1:]))
        F.scaled_dot_product_attention(*given, attn_mask=torch.ones(64, 64) > 0)
        counts = extension.get_dispatch_stats()
        assert (counts["quantized_autograd"], counts["pytorch_fallback"]) == (4, 3)
    finally:
        extension.clear_quantization_mode()
    assert torch.equal(F.scaled_dot_product_attention(*given, is_causal=True), stock)


def test_the_mode_ends_with_the_shim() -> None:
    given = small(64)
    with umfa.shim.metal_sdpa_extension():
        stock = F.scaled_dot_product_attention(*given)
        importlib.import_module("metal_sdpa_extension").set_quantization_mode(4, 0)
        assert not torch.equal(F.scaled_dot_product_attention(*given), stock)
    with umfa.shim.metal_sdpa_extension():
        assert torch.equal(F.scaled_dot_product_attention(*given), stock)


@pytest.mark.parametrize(
    ("precision", "mode", "text"),
    [
        (2, 0, "target_precision is unknown; got 2; expected QUANT_INT8"),
        (3, 7, "quant_mode is unknown; got 7; expected QUANT_TENSOR_WISE"),
        ([], 0, r"target_precision is unknown; got \[\]"),
    ],
)
def test_unknown_modes(extension: Any, precision: Any, mode: int, text: str) -> None:
    with pytest.raises(ValueError, match=rf"umfa\.shim\.set_quantization_mode\] {text}"):
        extension.set_quantization_mode(precision, mode)
    text = text.replace("set_quantization_mode", "metal_quantized_flash_attention_autograd")
    with pytest.raises(ValueError, match=text):
        extension.metal_quantized_flash_attention_autograd(*small(8), False, 0.0, precision, mode)
    stock = F.scaled_dot_product_attention(*small(8))
    assert torch.equal(F.scaled_dot_product_attention(*small(8)), stock)


# ---- the modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "/somewhere"])
@pytest.mark.parametrize("children", [True, False])
def test_everything_is_restored(
    given: str | None, children: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    environment, modules = dict(os.environ), set(sys.modules)
    shim = umfa.shim.metal_sdpa_extension(children=children)
    assert umfa.shim.metal_sdpa_extension(children=children) is shim  # twice is once
    assert umfa_torch.is_enabled()
    assert all(importlib.util.find_spec(name) for name in NAMES)
    assert (os.environ.get("PYTHONPATH") != given) is children
    shim.remove()
    shim.remove()
    assert dict(os.environ) == environment
    assert not {*NAMES} & (set(sys.modules) - modules)
    assert not umfa_torch.is_enabled()
    with pytest.raises(ImportError):
        importlib.import_module(NAMES[0])


@pytest.mark.parametrize("first", [True, False])
def test_umfa_stays_where_the_program_has_enabled_it(first: bool) -> None:
    try:
        if first:
            umfa_torch.enable()
        shim = umfa.shim.metal_sdpa_extension()
        umfa_torch.enable()
        shim.remove()
        assert umfa_torch.is_enabled()
    finally:
        umfa_torch.disable()
    assert not umfa_torch.is_enabled()


@pytest.mark.parametrize("name", NAMES)
def test_a_real_module_is_not_shadowed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for _ in range(2):  # found on the path, and in sys.modules
            text = f"{name} can be imported already.*{name}"
            with pytest.raises(umfa.UnsupportedError, match=text):
                umfa.shim.metal_sdpa_extension()
            assert not umfa_torch.is_enabled()
            assert importlib.import_module(name).real
    finally:
        sys.modules.pop(name, None)


CHECK = """
import torch
import torch.nn.functional as F
import metal_sdpa_extension as extension

extension.clear_quantization_mode()

def plain(query, key, value):
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1) @ value

for shape, dtype, limit in (
    ((1, 4, 64, 64), torch.float32, 1e-4),
    ((1, 4, 64, 64), torch.bfloat16, 5e-2),
    ((1, 24, 512, 128), torch.float32, 1e-4),
    ((1, 4, 1024, 128), torch.float32, 1e-4),
):
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    out = extension.metal_flash_attention_autograd(q, k, v, False, 0.0)
    assert out.grad_fn is not None and out.dtype == dtype
    expected = plain(*(x.detach().float() for x in (q, k, v)))
    torch.testing.assert_close(out.detach().float(), expected, rtol=limit, atol=limit)
before = dict(extension.get_dispatch_stats())
F.scaled_dot_product_attention(q, k, v).square().mean().backward()
after = extension.get_dispatch_stats()
assert after["fp32_autograd"] == before["fp32_autograd"] + 1, after
assert after["pytorch_fallback"] == 0, after
import pytorch_custom_op_ffi
assert pytorch_custom_op_ffi.is_metal_sdpa_available() in (False, True)
import umfa.shim
umfa.shim.metal_sdpa_extension().remove()
print("checked", extension.__file__)
"""


def test_another_process_checks_it_as_simpletuner_does() -> None:
    """Its processes have the environment of this one, and 30 seconds."""
    command = [sys.executable, "-c", CHECK]
    with umfa.shim.metal_sdpa_extension():
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("checked")
    after = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert "ModuleNotFoundError: No module named 'metal_sdpa_extension'" in after.stderr


def test_the_folder_for_programs_that_one_cannot_change() -> None:
    command = [sys.executable, "-m", "umfa.shim"]
    given = {"capture_output": True, "text": True, "check": False}
    found: Any = subprocess.run([*command, "metal_sdpa_extension"], **given)  # type: ignore[call-overload]
    assert found.returncode == 0, found.stderr
    environment = {**os.environ, "PYTHONPATH": found.stdout.strip()}
    line = "import metal_sdpa_extension, umfa.torch; print(umfa.torch.is_enabled())"
    child: Any = subprocess.run([sys.executable, "-c", line], env=environment, **given)  # type: ignore[call-overload]
    assert child.stdout.strip() == "True", child.stderr
    wrong: Any = subprocess.run([*command, "flash"], **given)  # type: ignore[call-overload]
    assert wrong.returncode == 2
    assert "metal_sdpa_extension" in wrong.stderr
