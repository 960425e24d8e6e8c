"""Calls of the public functions and their gradients in float64, for every framework's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import umfa
from tests import reference
from tests.array_libraries import Array
from tests.cases import normal
from tests.sequences import offsets

Q, K, V = (2, 9, 4, 16), (2, 13, 2, 16), (2, 13, 2, 24)
"""Shapes in the layout BSHD: two query heads for each of the keys'."""


class Call(NamedTuple):
    """A function of umfa, the tensors to differentiate with respect to, and the other arguments."""

    function: Callable[..., Any]
    tensors: dict[str, Array]
    options: dict[str, Any]
    gradients: Callable[[Array, Array | None], dict[str, Any]]
    """Of (dout, dlse), by the tensors' names."""

    def rebuilt(self, tensor: Callable[[Array], Any]) -> tuple[list[Any], Callable[..., Any]]:
        """The framework's tensors, and the call as a function of them."""
        names = tuple(self.tensors)

        def call(*given: Any, **more: Any) -> Any:
            return self.function(**dict(zip(names, given, strict=True)), **self.options, **more)

        return [tensor(array) for array in self.tensors.values()], call


def _dense(names: tuple[str, str, str], more: dict[str, Array], **options: Any) -> Call:
    """`flash_attn_func` with all `more` tensors."""
    shapes = dict(zip(names, (Q, K, V), strict=True))
    tensors = {name: normal(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= more
    renamed = {"attn_mask": "mask"}
    to_field = {"attn_mask": "dmask", "learnable_sink": "dsinks"}

    def gradients(dout: Array, dlse: Array | None) -> dict[str, Any]:
        rest = {renamed.get(name, name): x for name, x in more.items()}
        own = reference.gradients(*(tensors[x] for x in names), dout, dlse, **rest, **options)
        first = dict(zip(names, own[:3], strict=True))
        return first | {name: getattr(own, to_field.get(name, f"d{name}")) for name in more}

    return Call(umfa.flash_attn_func, tensors, options, gradients)


def every_tensor() -> Call:
    more = {
        "qv": normal((*Q[:3], V[3]), seed=3),
        "attn_mask": normal((2, 1, Q[1], K[1]), seed=4),
        "learnable_sink": normal((4,), seed=5),
        "alibi_slopes": np.abs(normal((4,), seed=6)),
    }
    return _dense(("q", "k", "v"), more, causal=True, softcap=20.0)


def plain() -> Call:
    return _dense(("q", "k", "v"), {})


def dropout() -> Call:
    return _dense(("q", "k", "v"), {}, dropout_p=0.25, dropout_seed=2**63 + 5, window_size=(5, 2))


def _packed(function: Callable[..., Any], first: str | None, rest: str) -> Call:
    shape = (2, 7, 3, 8)
    parts = [normal(shape, seed=i) for i in range(3)]
    alone, stacked = (parts[:1], parts[1:]) if first else ([], parts)
    tensors = {first: alone[0]} if first else {}
    tensors[rest] = np.stack(stacked, axis=2)

    def gradients(dout: Array, dlse: Array | None) -> dict[str, Any]:
        own = reference.gradients(*parts, dout, dlse, causal=True)[:3]
        found = {first: own[0]} if first else {}
        return found | {rest: np.stack(own[len(alone) :], axis=2)}

    return Call(function, tensors, {"causal": True}, gradients)


def qkvpacked() -> Call:
    return _packed(umfa.flash_attn_qkvpacked_func, None, "qkv")


def kvpacked() -> Call:
    return _packed(umfa.flash_attn_kvpacked_func, "q", "kv")


def sdpa() -> Call:
    shapes = {"query": (2, 4, 9, 16), "key": (2, 4, 13, 16), "value": (2, 4, 13, 16)}
    tensors = {name: normal(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["attn_mask"] = normal((9, 13), seed=3)

    def gradients(dout: Array, dlse: Array | None) -> dict[str, Any]:
        turned = [tensors[name].transpose(0, 2, 1, 3) for name in shapes]
        mask = tensors["attn_mask"]
        own = reference.gradients(*turned, dout.transpose(0, 2, 1, 3), mask=mask)
        back = [x.transpose(0, 2, 1, 3) for x in own[:3]]
        return dict(zip(tensors, (*back, own.dmask), strict=True))

    return Call(umfa.scaled_dot_product_attention, tensors, {}, gradients)


def varlen() -> Call:
    lengths_q, lengths_k = [5, 0, 8], [6, 3, 9]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    shapes = {"q": (13, 4, 16), "k": (18, 2, 16), "v": (18, 2, 24)}
    tensors = {name: normal(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}

    def gradients(dout: Array, dlse: Array | None) -> dict[str, Any]:
        found = {name: np.zeros(shape) for name, shape in shapes.items()}
        for b in range(3):
            at_q, at_k = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
            at = {"q": at_q, "k": at_k, "v": at_k}
            own = reference.gradients(
                *(tensors[name][None, rows] for name, rows in at.items()),
                dout[None, at_q],
                None if dlse is None else dlse[None, :, at_q],
                causal=True,
            )
            for (name, rows), gradient in zip(at.items(), own[:3], strict=True):
                found[name][rows] = gradient[0]
        return found

    options = {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 8, "max_seqlen_k": 9,
        "causal": True,
    }  # fmt: skip
    return Call(umfa.flash_attn_varlen_func, tensors, options, gradients)


CALLS = (plain, every_tensor, dropout, qkvpacked, kvpacked, sdpa, varlen)
