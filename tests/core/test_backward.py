"""The backward pass on the CPU: each option against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import umfa
from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.attend import BHSD, BSHD
from tests.cases import normal
from tests.gradients import (
    RELATIVE,
    Forward,
    assert_gradients,
    compare,
    wanted_of,
)
from tests.reference import Gradients
from tests.sequences import offsets, rotary_tables, rotated, slopes_of
from tests.tiers import crossed
from umfa import _ext


def tensors(
    shape: tuple[int, int, int, int, int],
    dtype: str = "float32",
    *,
    heads_k: int | None = None,
    head_dim_v: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Array], Array, Array]:
    """Query, key and value of (batch, heads, seqlen_q, seqlen_k, head_dim), dout and dlse."""
    batch, heads, seqlen_q, seqlen_k, head_dim = shape
    heads_k, head_dim_v = heads_k or heads, head_dim_v or head_dim
    shapes = {
        "query": (batch, seqlen_q, heads, head_dim),
        "key": (batch, seqlen_k, heads_k, head_dim),
        "value": (batch, seqlen_k, heads_k, head_dim_v),
        "dout": (batch, seqlen_q, heads, head_dim_v),
    }
    found = {
        name: normal(x, dtype, seed=10 * seed + i) for i, (name, x) in enumerate(shapes.items())
    }
    dout = found.pop("dout")
    return found, dout, normal((batch, heads, seqlen_q), seed=10 * seed + 9)


def expected(given: dict[str, Any], dout: Array, dlse: Array | None = None) -> Gradients:
    """The reference's gradients of a call with the core's own names."""
    own = dict(given)
    renamed = {"attn_mask": "mask"}
    if own.pop("causal_alignment", "") == "top_left":
        own["alignment"] = "upper_left"
    if "prefix_lens" in own:
        (own["prefix_len"],) = set(own.pop("prefix_lens").tolist())
    own.pop("out_dtype", None)
    q, k, v = (own.pop(name) for name in ("query", "key", "value"))
    options = {renamed.get(name, name): x for name, x in own.items()}
    return reference.gradients(q, k, v, dout, dlse, **options)


def check(given: dict[str, Any], dout: Array, dlse: Array | None = None) -> None:
    found = Forward(**given).backward(dout, dlse, wanted=wanted_of(given))
    # Also of float32 gradients: delta comes from an out that has been rounded.
    dtypes = {str(x.dtype) for x in found.values()}
    assert_gradients(found, expected(given, dout, dlse), max(RELATIVE[x] for x in dtypes))


RNG = np.random.default_rng(0)
SLOPES = RNG.uniform(0, 0.5, (2, 4)).astype(np.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": True, "causal_alignment": "top_left"},
    "window": {"window_size": (50, 20)},
    "window to the right": {"window_size": (-3, 60), "window_offsets": True},
    "chunks": {"attention_chunk": 33, "attention_chunk_offset": 5},
    "prefix": {"causal": True, "prefix_lens": np.array([20, 20])},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES[0]},
    "alibi by batch": {"alibi_slopes": SLOPES},
    "sinks": {"learnable_sink": RNG.standard_normal(4).astype(np.float16)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5, "dropout_offset": 2},
    "scale": {"softmax_scale": -0.3},
    "bool mask": {"attn_mask": RNG.random((2, 1, 100, 130)) < 0.5},
}


@pytest.mark.parametrize(
    ("name", "dtype", "heads_k"),
    crossed(list(OPTIONS), ["float32", "float16", "bfloat16"], [4, 2]),
)
def test_options(name: str, dtype: str, heads_k: int) -> None:
    given, dout, dlse = tensors((2, 4, 100, 130, 40), dtype, heads_k=heads_k, head_dim_v=48)
    check(given | OPTIONS[name], dout, dlse)


MASKS = [
    (2, 4, 100, 230), (100, 230), (4, 100, 230), (2, 1, 100, 230), (2, 1, 1, 230), (4, 100, 1),
    (1, 1), (2, 4, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), crossed(MASKS, ["float32", "bfloat16", "float16"]))
def test_mask(shape: tuple[int, ...], dtype: str) -> None:
    """The gradient has the mask's own shape. One number for all has hardly any: it is exactly 0 but
    for sinks, which it does not move."""
    rng = np.random.default_rng(1)
    given, dout, dlse = tensors((2, 4, 100, 230, 32), heads_k=2)
    mask = rng.standard_normal(shape)
    if len(shape) > 2:
        mask[rng.random(shape) < 0.2] = -np.inf
    given |= {
        "attn_mask": mask.astype(DTYPES[dtype]),
        "learnable_sink": rng.standard_normal(4).astype(np.float32),
        "softcap": 5.0,
    }
    check(given, dout, dlse)


@pytest.mark.parametrize(
    ("head_dim", "causal", "dtype"),
    crossed([32, 64, 72, 80, 96, 128, 192, 256], [False, True], ["float32", "bfloat16"]),
)
def test_a27_head_dims(head_dim: int, causal: bool, dtype: str) -> None:
    given, dout, dlse = tensors((2, 4, 256, 256, head_dim), dtype)
    check(given | {"causal": causal}, dout, dlse)


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_a28_masks(kind: str) -> None:
    given, dout, dlse = tensors((1, 4, 192, 160, 64))
    numbers = np.random.default_rng(2).standard_normal((1, 4, 192, 160))
    mask = numbers > 0 if kind == "bool" else numbers.astype(np.float32)
    check(given | {"attn_mask": mask}, dout, dlse)


def test_a29_grouped_heads() -> None:
    given, dout, dlse = tensors((2, 8, 128, 128, 64), heads_k=2)
    check(given, dout, dlse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qv(dtype: str) -> None:
    given, dout, dlse = tensors((2, 4, 70, 90, 40), dtype, heads_k=2, head_dim_v=72)
    check(given | {"qv": normal((2, 70, 4, 72), dtype, seed=8), "causal": True}, dout, dlse)


SHAPES = [
    (1, 1, 1, 1, 1), (1, 2, 3, 700, 8), (1, 1, 1200, 650, 64), (1, 1, 70, 100, 576),
    (1, 2, 67, 101, 17),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    given, dout, dlse = tensors(shape, dtype, head_dim_v=min(shape[4], 512))
    check(given, dout, dlse)


@pytest.mark.parametrize("name", ["query", "key"])
def test_no_rows(name: str) -> None:
    shape = (1, 2, 0, 5, 8) if name == "query" else (1, 2, 5, 0, 8)
    given, dout, dlse = tensors(shape)
    for gradient in Forward(**given).backward(dout, dlse).values():
        assert not gradient.any()


def test_layout_strides_and_float32() -> None:
    """Any strides; and gradients of float16 tensors in float32, which rounding has not touched."""
    given, dout, dlse = tensors((2, 4, 60, 80, 40), "float16")
    wide = {name: np.repeat(x, 2, axis=3)[..., ::2] for name, x in given.items()}
    bhsd = {name: x.transpose(0, 2, 1, 3) for name, x in wide.items()}
    function = _ext.Function("umfa.test", layout="bhsd")
    call = Forward(function, **bhsd, out_dtype="float32")
    found = call.backward(dout.transpose(0, 2, 1, 3), dlse, float32=True)
    turned = {name: x.transpose(0, 2, 1, 3) for name, x in found.items()}
    assert_gradients(turned, expected(given, dout, dlse), 2e-6)


BROADCAST = [
    ((2, 3, 4, 50, 16), (4, 60, 16), (2, 1, 1, 60, 24), (2, 1, 1, 1, 60)),
    ((50, 16), (2, 4, 60, 16), (4, 60, 16), (50, 60)),
    ((3, 1, 2, 50, 16), (1, 2, 2, 60, 16), (3, 2, 1, 60, 16), (2, 1, 50, 60)),
]


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    """Gradients of what broadcasts are sums; several batch dimensions, whatever their strides."""
    q, k, v, mask = (normal(shape, seed=i) for i, shape in enumerate(shapes))
    sinks = normal((max(s[-3] for s in shapes[:3] if len(s) > 2),), seed=6)
    given = {"query": q, "key": k, "value": v, "attn_mask": mask, "learnable_sink": sinks}
    call = Forward(BHSD, **given, grouped=False, causal_alignment="top_left")
    dout = normal(call.out.shape, seed=7)
    found = call.backward(dout, wanted=wanted_of(given))
    flat = reference.flattened(q, k, v, mask, enable_gqa=False)
    one = dout.reshape(-1, *dout.shape[-3:]).transpose(0, 2, 1, 3)
    own = reference.gradients(*flat.tensors, one, mask=flat.mask, learnable_sink=sinks)
    lead = dout.shape[:-3]
    for name, tensor, gradient in (("dq", q, own.dq), ("dk", k, own.dk), ("dv", v, own.dv)):
        full = gradient.transpose(0, 2, 1, 3)
        full = full.reshape(*lead, *full.shape[1:])
        compare(name, found[name], reference.summed_to(full, tensor.shape), 1e-5)
    assert own.dmask is not None
    full = own.dmask.reshape(*lead, *own.dmask.shape[1:])
    compare("dmask", found["dmask"], reference.summed_to(full, mask.shape), 1e-5)
    compare("dsinks", found["dsinks"], own.dsinks, 1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved: bool) -> None:
    """Gradients are rotated back."""
    given, dout, dlse = tensors((2, 4, 70, 90, 40), heads_k=2)
    cos, sin = rotary_tables(90, 24)
    more = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    found = Forward(**given, **more, causal=True).backward(dout, dlse)
    at = {"query": np.arange(20, 90), "key": np.arange(90)}
    turned = {
        name: rotated(x.astype(np.float64), cos, sin, at[name], interleaved=interleaved)
        for name, x in given.items()
        if name in at
    }
    own = expected(given | turned | {"causal": True}, dout, dlse)
    back = {
        "dq": rotated(own.dq, cos, -sin, at["query"], interleaved=interleaved),
        "dk": rotated(own.dk, cos, -sin, at["key"], interleaved=interleaved),
        "dv": own.dv,
    }
    assert_gradients(found, back, 1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_varlen(packed: bool) -> None:
    """Rows that belong to no sequence have a gradient of 0, whatever is in them."""
    lengths_q, lengths_k = [30, 0, 70, 5], [50, 40, 0, 150]
    heads, channels, batch = 4, 24, 4
    rng = np.random.default_rng(3)
    used = np.array([40, 40, 0, 100])
    if packed:
        cu_q, cu_k = offsets(lengths_q), offsets(lengths_k, np.int64)
        shapes = (int(cu_q[-1]) + 3, int(cu_k[-1]) + 2)
        starts = list(zip(cu_q[:-1], cu_k[:-1], strict=True))
        tables = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": used}
    else:
        lengths_q = [70] * batch
        shapes = (batch, 70), (batch, 160)
        starts = [((b,), (b,)) for b in range(batch)]
        pad = np.array([3, 0, 0, 20])
        index = np.array([2, 0, 3, 1])
        tables = {"seqused_k": used, "cache_leftpad": pad, "cache_batch_idx": index}

    def rows(shape: Any, heads: int) -> Array:
        shape = shape if isinstance(shape, tuple) else (shape,)
        return rng.standard_normal((*shape, heads, channels), dtype=np.float32)

    q, k, v = rows(shapes[0], heads), rows(shapes[1], 2), rows(shapes[1], 2)
    slopes = SLOPES[:1].repeat(batch, 0) * np.arange(1, 5)[:, None].astype(np.float32)
    mask = rng.standard_normal((batch, 1, 72, 160)).astype(np.float32)
    dout = rows(shapes[0], heads)
    own: list[Any] = []
    for b in range(batch):
        if packed:
            at_q = slice(starts[b][0], starts[b][0] + lengths_q[b])
            at_k = slice(starts[b][1], starts[b][1] + used[b])
            own.append((at_q, at_k))
        else:
            own.append(((b, slice(None)), (int(index[b]), slice(int(pad[b]), int(used[b])))))
    hidden = np.ones(k.shape[:-2], bool)
    for _, at_k in own:
        hidden[at_k] = False
    k[hidden], v[hidden] = np.nan, np.nan
    given = {"query": q, "key": k, "value": v, "attn_mask": mask, "alibi_slopes": slopes}
    call = Forward(BSHD, **given, **tables, causal=True, dropout_p=0.2, dropout_seed=1)
    found = call.backward(dout, wanted=wanted_of(given))
    wide = {name: np.zeros(x.shape) for name, x in found.items()}
    for b, (at_q, at_k) in enumerate(own):
        sizes = q[at_q].shape[0], k[at_k].shape[0]
        one = reference.gradients(
            q[at_q][None], k[at_k][None], v[at_k][None], dout[at_q][None], causal=True,
            dropout_p=0.2, dropout_seed=1, first_index=b, alibi_slopes=slopes_of(slopes, b),
            mask=mask[b : b + 1, :, : sizes[0], : sizes[1]],
        )  # fmt: skip
        wide["dq"][at_q], wide["dk"][at_k], wide["dv"][at_k] = one.dq[0], one.dk[0], one.dv[0]
        wide["dmask"][b, :, : sizes[0], : sizes[1]] = one.dmask
        wide["dalibi_slopes"][b] = one.dalibi_slopes
    assert_gradients(found, wide, 1e-5)


NAMES = [("dv",), ("dk", "dq"), ("dsinks",), ("dmask", "dalibi_slopes")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", NAMES)
def test_wanted_alone(names: tuple[str, ...], dtype: str) -> None:
    """Any subset has the bits that it has among all, in the order that was asked for."""
    given, dout, dlse = tensors((1, 4, 150, 700, 64), dtype, heads_k=2)
    given |= {
        "alibi_slopes": SLOPES[0],
        "learnable_sink": normal((4,), seed=3),
        "attn_mask": normal((4, 150, 700), seed=4),
    }
    call = Forward(**given)
    everything = call.backward(dout, dlse, wanted=wanted_of(given))
    found = call.backward(dout, dlse, wanted=names)
    assert tuple(found) == names
    for name, gradient in found.items():
        assert gradient.tobytes() == everything[name].tobytes(), name


@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_threads(dtype: str, options: bool) -> None:
    """Nor on how the pass is cut: one thread takes whole heads, many take pieces."""
    given, dout, dlse = tensors((1, 2, 700, 1300, 64), dtype, heads_k=1)
    if options:
        given |= {"attn_mask": normal((700, 1300), seed=4), "alibi_slopes": SLOPES[0, :2]}
    call = Forward(**given)
    threads = umfa.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            umfa.set_num_threads(count)
            results.append(call.backward(dout, dlse, wanted=wanted_of(given)))
    finally:
        umfa.set_num_threads(threads)
    for other in results[1:]:
        for name, gradient in other.items():
            assert gradient.tobytes() == results[0][name].tobytes(), name


def test_backend_and_count() -> None:
    given, dout, dlse = tensors((1, 1, 5, 5, 8))
    call = Forward(**given)
    before = umfa.stats().cpu_calls
    call.backward(dout, dlse)
    assert umfa.stats().cpu_calls == before + 1
    saved = call.saved(dout)
    options = _ext.Attention(BSHD, backend="cpu", **given).options
    asked = (options, call.exported(), saved, ("dq",))
    assert _ext.attention_backward_can_run(*asked) == (True, "")
