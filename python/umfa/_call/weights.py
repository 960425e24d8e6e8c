"""The attention weights as a matrix, for looking at small problems.

They are what attention gives of values that are the columns of an identity matrix; where dropout
makes them 0, it has dropped them. So the matrix shows what the kernels do, and not what somebody
thinks they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _ext
from .._errors import UnsupportedError, message
from .._frameworks import Framework

if TYPE_CHECKING:
    from .run import Prepared

COLUMNS = 512  # as many channels as a value can have


def check_possible(function: str, names: tuple[str, ...]) -> None:
    for name in ("qv", "block_table"):
        if name in names:
            raise UnsupportedError(
                message(
                    function,
                    f"the weights of a call with {name} cannot be returned",
                    "return_attn_probs=True with dropout",
                    "return_lse, or a call without dropout",
                )
            )


def weights_of(framework: Framework, call: Prepared, tensors: dict[str, Any]) -> Any:
    """(batch, nheads, longest seqlen_q, longest seqlen_kv): negative where dropout drops."""
    query_name, key_name, value_name = call.names[:3]
    query, value = tensors[query_name], tensors[value_name]
    rows = list(_sequences(tensors, query, value))
    most_q = max((q.stop - q.start for _, q, _ in rows), default=0)
    most_k = max((k.stop - k.start for _, _, k in rows), default=0)
    dropped = call.options.replace(return_attn_probs=False, out=None)
    plain = dropped.replace(dropout_p=0.0)
    # In float32, so that no weight is too small to show its sign.
    own = (query_name, key_name)
    asked = {
        name: framework.cast(tensor, "float32") if name in own else tensor
        for name, tensor in tensors.items()
        if name != "out"
    }
    found = np.zeros((len(rows), query.shape[-2], most_q, most_k), np.float32)
    for first in range(0, most_k, COLUMNS):
        width = min(COLUMNS, most_k - first)
        identity = np.zeros((*value.shape[:-1], width), np.float32)
        for b, _, k in rows:
            for j in range(first, min(first + width, k.stop - k.start)):
                identity[b + (k.start + j, slice(None), j - first)] = 1  # noqa: RUF005
        asked[value_name] = framework.from_numpy(identity, asked[query_name])
        seen, kept = (
            framework.to_numpy(_out(framework, call, options, asked))
            for options in (plain, dropped)
        )
        signed = np.where((kept == 0) & (seen > 0), -seen, seen)
        for i, (b, q, _) in enumerate(rows):
            own_rows = signed[b + (q,)].swapaxes(0, 1)  # noqa: RUF005
            found[i, :, : own_rows.shape[1], first : first + width] = own_rows
    return framework.from_numpy(found, query)


def _out(
    framework: Framework, call: Prepared, options: _ext.Options, tensors: dict[str, Any]
) -> Any:
    from .run import compute

    return compute(framework, call._replace(options=options), tensors)[0]


def _sequences(
    tensors: dict[str, Any], query: Any, value: Any
) -> Iterator[tuple[tuple[int, ...], slice, slice]]:
    """Of each sequence: its index of the batch, if there is one, and its rows."""
    if "cu_seqlens_q" not in tensors:
        for b in range(query.shape[0]):
            yield (b,), slice(0, query.shape[1]), slice(0, value.shape[1])
        return
    starts_q, starts_k = (np.asarray(tensors[f"cu_seqlens_{x}"]) for x in "qk")
    used_q, used_k = (
        np.diff(starts) if used is None else np.asarray(used)
        for starts, used in (
            (starts_q, tensors.get("seqused_q")),
            (starts_k, tensors.get("seqused_k")),
        )
    )
    for b in range(len(starts_q) - 1):
        q, k = int(starts_q[b]), int(starts_k[b])
        yield (), slice(q, q + int(used_q[b])), slice(k, k + int(used_k[b]))
