"""How the tests of the backward pass call umfa: its core, on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests import reference
from tests.array_libraries import DTYPES, Array
from tests.attend import BSHD
from umfa import _ext
from umfa._call import run as calls

OPERANDS = ("dq", "dk", "dv")
FIELDS = {
    "dq": "query",
    "dk": "key",
    "dv": "value",
    "dqv": "qv",
    "dmask": "attn_mask",
    "dsinks": "learnable_sink",
    "dalibi_slopes": "alibi_slopes",
}
"""The gradients, and what each belongs to."""

# Parts of the largest element of a gradient: what rounding the inputs of its products and itself to
# the dtype may cost.
RELATIVE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


FRAME, MARK = 64, 77.0
"""Elements on both sides of each gradient, and what they hold."""


class Forward:
    """One call, computed, and ready for its backward pass."""

    frames: list[tuple[Array, Array]]

    def __init__(self, function: _ext.Function = BSHD, backend: str = "cpu", **given: Any) -> None:
        attention = _ext.Attention(function, backend=backend, return_lse=True, **given)
        self.call = calls.prepared(attention.options)
        self.tensors = attention.tensors
        self.framework = calls.ready(self.call, self.tensors)
        self.out, self.lse = calls.compute(self.framework, self.call, self.tensors)

    def exported(self) -> tuple[Any, ...]:
        return calls.exported(self.framework, self.call, self.tensors)

    def saved(self, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        """As the extension takes them."""
        names = ("out", "lse", "dout", "dlse")
        return tuple(
            None if x is None else self.framework.export(x, self.call.function, name)
            for name, x in zip(names, (self.out, self.lse, dout, dlse), strict=True)
        )

    def _filled(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, Array]:
        """An array to be written, full of what must not stay there, in a frame that must."""
        size = int(np.prod(shape))
        whole = np.full(size + 2 * FRAME, np.nan, DTYPES[dtype])
        whole[:FRAME] = whole[FRAME + size :] = MARK
        self.frames.append((whole[:FRAME], whole[FRAME + size :]))
        array = whole[FRAME : FRAME + size].reshape(shape)
        return self.framework.export(array, self.call.function, "gradient"), array

    def backward(
        self,
        dout: Any,
        dlse: Any = None,
        *,
        wanted: tuple[str, ...] = OPERANDS,
        float32: bool = False,
    ) -> dict[str, Array]:
        """The gradients, by name."""
        self.frames = []
        found = _ext.attention_backward(
            self.call.options,
            self.exported(),
            self.saved(dout, dlse),
            wanted,
            self._filled,
            float32,
        )
        for name, frame in zip(wanted, self.frames, strict=True):
            for part in frame:
                assert (part == MARK).all(), f"{name}: something beside it was written"
        return dict(zip(wanted, found, strict=True))


def wanted_of(given: dict[str, Any]) -> tuple[str, ...]:
    """All gradients that the call has."""
    return tuple(
        name
        for name, field in FIELDS.items()
        if given.get(field) is not None and given[field].dtype != bool
    )


def assert_gradients(
    found: dict[str, Array],
    expected: reference.Gradients | dict[str, Any],
    tolerance: float,
) -> None:
    """Compare each gradient; `tolerance` counts in its largest element."""
    wide = expected if isinstance(expected, dict) else expected._asdict()
    for name, array in found.items():
        compare(name, array, wide[name], tolerance)


def compare(
    name: str, array: Array, expected: Array, tolerance: float, floor: float = 1e-30
) -> None:
    """`tolerance` counts in the largest expected element, or in `floor` if that is more."""
    largest = max(float(np.abs(expected).max(initial=0.0)), floor)
    error = np.abs(array.astype(np.float64) - expected)
    assert array.shape == expected.shape, f"{name}: shape {array.shape}, not {expected.shape}"
    bad = ~(error <= tolerance * largest)
    if bad.any():
        at = np.argmax(np.where(np.isnan(error), np.inf, error))
        worst = tuple(map(int, np.unravel_index(at, error.shape)))
        raise AssertionError(
            f"{name} is off at {int(bad.sum())} of {bad.size} elements; the worst is {worst}: "
            f"{array[worst]!r}, not {expected[worst]!r} ({error[worst] / largest:.3g} of the "
            f"largest, allowed {tolerance:.3g})"
        )
