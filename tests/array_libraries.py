"""The array libraries that users bring, behind one small interface, so that one test serves all.

A test makes its inputs with NumPy (bfloat16 through ml_dtypes), `Framework.tensor` hands them to
the library bit by bit, and `Framework.numpy` brings results back bit by bit. Nothing here computes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Array = NDArray[Any]


class Framework:
    """One array library. `module` is the library itself; arrays stay its own in all methods."""

    name: str
    module_name: str

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def array_type(self) -> type:
        """The class that results must be instances of."""
        raise NotImplementedError

    def tensor(self, array: Array) -> Any:
        """A contiguous tensor of this library with the same dtype and bits."""
        raise NotImplementedError

    def numpy(self, tensor: Any) -> Array:
        """The tensor as a NumPy array with the same dtype and bits."""
        raise NotImplementedError

    def dtype_name(self, tensor: Any) -> str:
        """'float32', 'float16' or 'bfloat16'."""
        return str(tensor.dtype).rpartition(".")[2]

    def permute(self, tensor: Any, axes: tuple[int, ...]) -> Any:
        return tensor.transpose(axes)

    def broadcast_to(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        return self.module.broadcast_to(tensor, shape)

    def float64(self, tensor: Any) -> NDArray[np.float64]:
        return self.numpy(tensor).astype(np.float64)

    def bits(self, tensor: Any) -> Array:
        """The bit patterns, for comparisons that allow no difference at all."""
        array = np.ascontiguousarray(self.numpy(tensor))
        return array.view(f"u{array.dtype.itemsize}")

    def __repr__(self) -> str:
        return self.name


class NumPy(Framework):
    name = module_name = "numpy"

    @property
    def array_type(self) -> type:
        return np.ndarray

    def tensor(self, array: Array) -> Any:
        return np.asarray(array, order="C")

    def numpy(self, tensor: Any) -> Array:
        return np.asarray(tensor)


class Torch(Framework):
    name = module_name = "torch"

    @property
    def array_type(self) -> type:
        return self.module.Tensor

    def tensor(self, array: Array) -> Any:
        array = np.array(array, order="C")  # a copy: torch warns about read-only memory
        if array.dtype == ml_dtypes.bfloat16:
            return self.module.from_numpy(array.view(np.int16)).view(self.module.bfloat16)
        return self.module.from_numpy(array)

    def numpy(self, tensor: Any) -> Array:
        if tensor.dtype == self.module.bfloat16:
            as_integers = tensor.detach().contiguous().view(self.module.int16)
            return as_integers.numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()

    def permute(self, tensor: Any, axes: tuple[int, ...]) -> Any:
        return tensor.permute(axes)


class Jax(Framework):
    name = "jax"
    module_name = "jax.numpy"

    @property
    def array_type(self) -> type:
        return importlib.import_module("jax").Array

    def tensor(self, array: Array) -> Any:
        return self.module.asarray(array)

    def numpy(self, tensor: Any) -> Array:
        return np.asarray(tensor)


class Mlx(Framework):
    name = "mlx"
    module_name = "mlx.core"

    @property
    def array_type(self) -> type:
        return self.module.array

    def tensor(self, array: Array) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            integers = self.module.array(np.asarray(array, order="C").view(np.uint16))
            return integers.view(self.module.bfloat16)
        return self.module.array(np.asarray(array, order="C"))

    def numpy(self, tensor: Any) -> Array:
        if tensor.dtype == self.module.bfloat16:
            return np.array(tensor.view(self.module.uint16)).view(ml_dtypes.bfloat16)
        return np.array(tensor)


_CLASSES: dict[str, type[Framework]] = {c.name: c for c in (NumPy, Torch, Jax, Mlx)}
NAMES: tuple[str, ...] = tuple(_CLASSES)


@functools.cache
def _load(name: str) -> Framework | None:
    try:
        return _CLASSES[name](importlib.import_module(_CLASSES[name].module_name))
    except ModuleNotFoundError:
        return None


def load(name: str) -> Framework:
    """The framework called `name`; skips the running test where it is not installed."""
    framework = _load(name)
    if framework is None:
        pytest.skip(f"{name} is not installed")
    return framework
