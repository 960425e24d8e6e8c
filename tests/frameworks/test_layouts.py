"""torch tensors that are no dense block of memory: refused in every place, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import umfa
from tests.cases import normal

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
UNSUPPORTED = umfa.UnsupportedError
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def given(*shape: int) -> Any:
    return torch.from_numpy(normal(shape, seed=len(shape)))


def nested(layout: Any) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        rows = [row[None] if row.ndim == 0 else row for row in x]  # jagged ones need a dimension
        return torch.nested.nested_tensor(rows, layout=layout)

    return change


class Wrapper(torch.Tensor):  # type: ignore[misc]
    """A tensor without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, x: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError("not to be asked for anything")


NESTED = (
    "{} is a nested tensor; got a nested tensor with layout torch.{}; expected a dense tensor "
    "(see flash_attn_varlen_func for sequences of different lengths)"
)
DENSE = "{} is not a dense tensor; got torch.{}; expected a plain strided tensor"
KINDS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "strided": (nested(torch.strided), UNSUPPORTED, NESTED),
    "jagged": (nested(torch.jagged), UNSUPPORTED, NESTED),
    "sparse_coo": (lambda x: x.to_sparse(), UNSUPPORTED, DENSE),
    "sparse_csr": (
        lambda x: x.reshape(x.shape[0], -1).to_sparse_csr(), UNSUPPORTED, DENSE,
    ),
    "_mkldnn": (lambda x: x.float().to_mkldnn(), UNSUPPORTED, DENSE),
    "qint8": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), UNSUPPORTED, DENSE,
    ),
    "meta": (lambda x: x.to("meta"), ValueError, "{} has no data; got device {}; expected "),
    "complex64": (lambda x: x.to(torch.complex64), TypeError, "{} has the wrong dtype; got {}; "),
    "Wrapper": (
        Wrapper, UNSUPPORTED,
        "{} is a tensor subclass without memory of its own; "
        "got tests.frameworks.test_layouts.{}; expected a plain ",
    ),
}  # fmt: skip

X, ROWS = given(2, 4, 2, 8), given(4, 2, 8)
STARTS = torch.tensor([0, 4])
VARLEN = {
    "q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS,
    "max_seqlen_q": 4, "max_seqlen_k": 4,
}  # fmt: skip
QKV = {"q": X, "k": X, "v": X}
DROPPED = {"dropout_p": 0.5, "dropout_seed": 1}
CACHE = {"q": X, "k_cache": X.clone(), "v_cache": X.clone()}
APPEND = {**CACHE, "k": X, "v": X, "cache_seqlens": torch.tensor([0, 0])}
SDPA = {"query": X, "key": X, "value": X}
ANGLES = {"rotary_cos": given(4, 4), "rotary_sin": given(4, 4)}
PARTS = {"out_partial": given(2, 1, 4, 2, 8), "lse_partial": given(2, 1, 4, 2)}
# (function, good arguments, which of them becomes bad)
PLACES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    *((umfa.flash_attn_func, QKV, name) for name in QKV),
    (umfa.flash_attn_func, {**QKV, "attn_mask": given(2, 2, 4, 4)}, "attn_mask"),
    (umfa.flash_attn_func, {**QKV, "alibi_slopes": given(2, 2)}, "alibi_slopes"),
    (umfa.flash_attn_func, {**QKV, "learnable_sink": given(2)}, "learnable_sink"),
    (umfa.flash_attn_func, {**QKV, "qv": X}, "qv"),
    (umfa.flash_attn_func, {**QKV, **DROPPED, "return_attn_probs": True}, "q"),
    (umfa.flash_attn_qkvpacked_func, {"qkv": given(2, 4, 3, 2, 8)}, "qkv"),
    (umfa.flash_attn_kvpacked_func, {"q": X, "kv": given(2, 4, 2, 2, 8)}, "kv"),
    *((umfa.flash_attn_varlen_func, VARLEN, name) for name in ("q", "k", "v")),
    *((umfa.flash_attn_varlen_func, VARLEN, f"cu_seqlens_{x}") for x in "qk"),
    (
        umfa.flash_attn_varlen_qkvpacked_func,
        {"qkv": given(4, 3, 2, 8), "cu_seqlens": STARTS, "max_seqlen": 4}, "qkv",
    ),
    (
        umfa.flash_attn_varlen_kvpacked_func,
        {"kv": given(4, 2, 2, 8), **{n: x for n, x in VARLEN.items() if n not in "kv"}}, "kv",
    ),
    *((umfa.flash_attn_with_kvcache, CACHE, name) for name in CACHE),
    *((umfa.flash_attn_with_kvcache, APPEND, name) for name in APPEND),
    *(
        (umfa.flash_attn_with_kvcache, {**CACHE, "attn_mask": given(2, 2, 4, 4)}, name)
        for name in ("q", "k_cache", "attn_mask")
    ),
    (umfa.flash_attn_with_kvcache, {**CACHE, "cache_seqlens": 2}, "q"),
    (
        umfa.flash_attn_with_kvcache,
        {**CACHE, "block_table": torch.tensor([[0], [1]])}, "block_table",
    ),
    *((umfa.fused_rope_attention, {**QKV, **ANGLES}, name) for name in ("q", *ANGLES)),
    *((umfa.scaled_dot_product_attention, SDPA, name) for name in SDPA),
    (umfa.scaled_dot_product_attention, {**SDPA, "attn_mask": given(2, 4, 2, 2)}, "attn_mask"),
    *(
        (umfa.flash_attn_combine, {**PARTS, "out": given(1, 4, 2, 8)}, name)
        for name in (*PARTS, "out")
    ),
]  # fmt: skip


def memory(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() for name, x in arguments.items() if type(x) is torch.Tensor}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place", PLACES, ids=lambda place: f"{place[0].__name__}-{place[2]}-{len(place[1])}"
)
def test_only_dense_tensors(place: Any, kind: str) -> None:
    function, good, bad = place
    change, error, text = KINDS[kind]
    arguments = good | {bad: change(good[bad])}
    others = {name: x for name, x in arguments.items() if name != bad}
    before = memory(others)
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    prefix = f"[umfa.{function.__name__}] "
    assert message.startswith(prefix)
    assert text.split("{}")[1] in message
    assert kind in message
    assert message[len(prefix) :].startswith(bad)  # or a slice of it
    reason = message.replace(prefix, "[umfa.can_run] ", 1)
    assert umfa.can_run(function, **arguments) == (False, reason)
    for name, x in before.items():
        assert torch.equal(others[name], x), f"{name} was written"


@pytest.mark.parametrize(
    "change",
    [nested(torch.strided), nested(torch.jagged), lambda x: x[0, 0].to("meta"), lambda x: x[0]],
    ids=["strided", "jagged", "meta", "dimensions"],
)
def test_a_length_is_one_number(change: Callable[[Any], Any]) -> None:
    length = change(torch.tensor([[4, 4]]))
    arguments = VARLEN | {"max_seqlen_q": length}
    with pytest.raises(TypeError, match=r"^\[umfa\.\w+\] max_seqlen_q is not an integer"):
        umfa.flash_attn_varlen_func(**arguments)
    assert not umfa.can_run(umfa.flash_attn_varlen_func, **arguments)[0]


def test_a_nested_query_beside_a_causal_bias() -> None:
    from torch.nn.attention.bias import causal_lower_right

    query = nested(torch.strided)(X)
    with pytest.raises(UNSUPPORTED, match="query is a nested tensor"):
        umfa.scaled_dot_product_attention(query, X, X, causal_lower_right(2, 2))
