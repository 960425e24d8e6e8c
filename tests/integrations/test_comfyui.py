"""`umfa.comfyui` beside a stand-in of ComfyUI's calling convention.

ComfyUI is no package that can be installed here, so nothing of this runs in it. The stand-in does
what its source does (Comfy-Org/ComfyUI, commit 05080f6). Attention functions are wrapped. A wrapper
asks ``transformer_options["optimized_attention_override"]``, if it is given, with the function that
it wraps and a mark that it is inside. Nodes clone models, with their options.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import umfa
from tests.checks import BASE, assert_close

torch = pytest.importorskip("torch")
F = torch.nn.functional
comfyui = pytest.importorskip("umfa.comfyui")

WHERE = "comfyui.optimized_attention"
KEY = "optimized_attention_override"
B, H, T, S, D = 2, 4, 10, 7, 16


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            override = (kwargs.get("transformer_options") or {}).get(KEY)
            if override is not None:
                return override(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


@wrapped
def stock(
    q: Any, k: Any, v: Any, heads: int, mask: Any = None, attn_precision: Any = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """As ComfyUI's attention by torch."""
    assert kwargs.pop("_inside_attn_wrapper")
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    more = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Model:
    """ComfyUI's ModelPatcher, as far as nodes see it."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.model_options = {"transformer_options": {}} if options is None else options

    def clone(self) -> Model:
        return Model({name: dict(x) for name, x in self.model_options.items()})

    def run(self, *args: Any, **kwargs: Any) -> Any:
        options = self.model_options["transformer_options"]
        return stock(*args, transformer_options=options, **kwargs)


def node(model: Model, enabled: bool = True) -> Model:
    """What ComfyUI does with a node."""
    (kind,) = comfyui.NODE_CLASS_MAPPINGS.values()
    assert set(kind.INPUT_TYPES()["required"]) == {"model", "enabled"}
    (made,) = getattr(kind(), kind.FUNCTION)(model=model, enabled=enabled)
    assert kind.RETURN_TYPES == ("MODEL",)
    return made


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
            return Counter({x.reason: x.calls for x in stats.left if x.where == WHERE})

        return dict(of(umfa.stats()) - of(self.before))


def tensors(flat: bool = True, kv_heads: int = H, dtype: str = "float32") -> list[Any]:
    """(batch, rows, heads * head_dim), or else with a dimension of heads, as a view."""
    generator = torch.Generator().manual_seed(1)
    sizes = (T, H), (S, kv_heads), (S, kv_heads)
    made = [torch.randn(B, n, h * D, generator=generator) for n, h in sizes]
    made = [x.to(getattr(torch, dtype)) for x in made]
    return made if flat else [x.unflatten(2, (-1, D)).transpose(1, 2) for x in made]


def sees(*shape: int) -> Any:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True
    return mask


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask of rows": {"mask": sees(T, S)},
    "mask of a batch": {"mask": sees(B, T, S)},
    "mask of keys": {"mask": sees(B, 1, 1, S)},
    "numbers": {"mask": torch.linspace(-2, 1, B * S).view(B, 1, S)},
    "scale": {"scale": 0.4},
    "hints": {"attn_precision": torch.float32, "low_precision_attention": False},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reshapes", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_gets_what_it_got(
    options: dict[str, Any], reshapes: tuple[bool, bool], dtype: str
) -> None:
    skip, skip_output = reshapes
    q, k, v = tensors(not skip, 2 if "enable_gqa" in options else H, dtype)
    options = dict(options)
    if "mask" in options and options["mask"].dtype != torch.bool:
        options["mask"] = options["mask"].to(q.dtype)  # torch demands it
    options |= {"skip_reshape": skip, "skip_output_reshape": skip_output}
    model = Model()
    expected = model.run(q, k, v, H, **options)
    counted = Counted()
    found = node(model).run(q, k, v, H, **options)
    assert (counted.taken, counted.left) == ({WHERE: 1}, {})
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    exact = model.run(*(x.double() for x in (q, k, v)), H, **{
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x
        for name, x in options.items()
    })  # fmt: skip
    assert_close(found.double().numpy(), exact.numpy(), BASE[dtype])


def test_the_signature_is_comfyui_s() -> None:
    names = list(inspect.signature(inspect.unwrap(stock)).parameters)[:-1]
    own = list(inspect.signature(comfyui.attention).parameters)
    assert own[: len(names)] == names


def test_a_model_for_itself() -> None:
    """The node changes a clone, keeps its other options, and can be switched off."""
    plain = Model({"transformer_options": {"patches": 1}, "other": {"a": 2}})
    ours = node(plain)
    assert plain.model_options == {"transformer_options": {"patches": 1}, "other": {"a": 2}}
    assert ours.model_options["transformer_options"]["patches"] == 1
    twice = node(ours).model_options["transformer_options"][KEY]
    assert twice is ours.model_options["transformer_options"][KEY]
    assert node(ours, enabled=False).model_options == plain.model_options
    assert node(plain, enabled=False).model_options == plain.model_options
    q, k, v = tensors()
    counted = Counted()
    plain.run(q, k, v, H)
    assert counted.taken == {}
    ours.run(q, k, v, H)
    assert counted.taken == {WHERE: 1}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": "float64"}, "q has the wrong dtype; got float64"),
    "unknown": ({"other_option": 1}, "an option is unknown; got other_option"),
    "precision": ({"attn_precision": torch.float64}, "attn_precision is above umfa's; got torch.f"),
}


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_umfa_leaves(options: dict[str, Any], reason: str, previous: bool) -> None:
    """ComfyUI's function computes it, or what another node has set; both get all that came."""
    options = dict(options)
    q, k, v = tensors(dtype=options.pop("dtype", "float32"))
    asked = []

    def other(function: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return function(*args, **kwargs)

    plain = Model({"transformer_options": {KEY: other} if previous else {}})
    ours = node(plain)
    counted = Counted()
    assert torch.equal(ours.run(q, k, v, H, **options), plain.run(q, k, v, H, **options))
    assert counted.taken == {}
    ((found, calls),) = counted.left.items()
    assert found.startswith(reason)
    assert calls == 1
    assert len(asked) == 2 * previous
    assert all(kwargs["_inside_attn_wrapper"] for kwargs in asked)
    assert node(ours, enabled=False).model_options == plain.model_options


def test_wrong_calls_raise_comfyui_s_error() -> None:
    q, k, v = tensors()
    with pytest.raises(RuntimeError):
        node(Model()).run(q, k[..., :40], v, H)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"q and heads do not fit; got \(2, 10, 64\) and 3"),
        ({"k": torch.zeros(B, S, 40)}, r"k does not fit; got \(2, 7, 40\)"),
        ({"k": torch.zeros(B, S, 32)}, "heads differ; got 4, 2 and 4"),
        ({"skip_reshape": True}, "heads is not that of q; got 5; expected 4"),
        ({"q": torch.zeros(B, S, 4, 8)}, r"q has 4 dimensions; got shape \(2, 7, 4, 8\)"),
        ({"v": torch.zeros(S)}, r"v has 1 dimensions; got shape \(7,\)"),
        ({"q": torch.zeros(B, S, 0)}, r"q and heads do not fit; got \(2, 7, 0\) and 4"),
    ],
    ids=str,
)
def test_wrong_values(change: dict[str, Any], message: str) -> None:
    q, k, v = tensors(flat="skip_reshape" not in change)
    given = {"q": q, "k": k, "v": v, "heads": 5 if "skip_reshape" in change else H, **change}
    with pytest.raises(ValueError, match=r"^\[umfa\.comfyui\.attention\] " + message):
        comfyui.attention(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q is not a tensor of torch; got NoneType"),
        ({"k": [1.0]}, "k is not a tensor of torch; got list"),
        ({"mask": [True]}, "mask is not a tensor of torch; got list"),
        ({"heads": "4"}, "heads"),
        ({"heads": 4.0}, "heads"),
        ({"attn_precision": "fp32"}, "attn_precision is no dtype; got 'fp32'"),
    ],
    ids=str,
)
def test_wrong_types(change: dict[str, Any], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"^\[umfa\.comfyui\.attention\] " + message):
        comfyui.attention(**{"q": q, "k": k, "v": v, "heads": H, **change})


def test_what_is_no_tensor_goes_to_comfyui() -> None:
    """Its own error is raised, or another node knows what it is."""
    q, k, v = tensors()
    counted = Counted()
    override = comfyui._Override(lambda function, *args, **kwargs: "another node's")
    assert override(len, q, k, v, H, mask=["a mask of that node's"]) == "another node's"
    assert list(counted.left) == ["mask is not a tensor of torch; got list; expected torch.Tensor"]
