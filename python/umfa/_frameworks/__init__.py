"""Which framework a tensor belongs to. No framework is imported before the caller has done so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from .._errors import message
from ._buffer import as_array, is_buffer
from ._versions import check_version

__all__ = [
    "FUNCTIONS",
    "Autodiff",
    "Framework",
    "causal_bias",
    "framework_of",
    "is_buffer",
    "known_framework",
    "shape_of",
]


class Autodiff(Protocol):
    """Running a call as one operation that a framework can differentiate, transform and record."""

    def __hash__(self) -> int:
        """It is a module."""

    def applies(self, tensors: Iterable[Any]) -> bool:
        """Whether a call on these tensors has to go through `run`."""

    def run(self, call: Any, tensors: dict[str, Any]) -> tuple[Any, ...]:
        """(out, lse) or (out, lse, weights) of a call, a `_call.gradients.Differentiable`."""

    def wanted(self, tensors: Iterable[Any]) -> list[bool]:
        """For each tensor, whether its gradient may be asked for."""

    def refuse(self, function: str, tensors: dict[str, Any]) -> None:
        """Raises where `run` would be needed, for a function that cannot be differentiated."""

    def zeros_like(self, tensor: Any) -> Any:
        """Zeros of the same shape and dtype."""

    def transformed(self) -> bool:
        """Whether tensors may have no memory of their own now: a transform or a recorder is at
        work."""

    def records(self) -> bool:
        """Whether operations are recorded now, and run later."""


class Framework(Protocol):
    """What umfa needs to know about one framework's tensors. Each module here is one."""

    def __hash__(self) -> int:
        """It is a module."""

    call: Callable[..., Any] | None
    """call(compute, function, *tensors, backend=) is compute(*tensors) of a function without a
    backward pass, so that the framework's autograd notices. None: it has no need to be told."""

    recorded: Callable[[Callable[[], Any], Any], Any] | None
    """recorded(compute, backend) is compute(), in which `export` shows tensors that may have no
    value yet and `in_stream` is true, if calls on the backend become part of the framework's graph.
    None: the framework has none that they could."""

    autodiff: Autodiff | None
    """The framework's automatic differentiation. None: it has none, or umfa refuses it."""

    autocast: Callable[[str, dict[str, Any], tuple[str, ...], tuple[str, ...]], None] | None
    """autocast(function, tensors, written, cast) replaces the tensors `cast`, by argument name, by
    copies in the dtype of the framework's automatic mixed precision, except tensors that are
    `written` in place. None: the framework has no automatic mixed precision."""

    def export(self, tensor: Any, function: str, argument: str, backend: str = "auto") -> Any:
        """A DLPack object on the tensor's memory, which holds its value, now or when the tensor's
        stream has run; raises if it cannot.

        `backend` matters where a framework can show the same memory as the CPU's and as the GPU's.
        """

    def allocate(
        self, like: Any, shape: tuple[int, ...], dtype: str, backend: str = "auto"
    ) -> tuple[Any, Any]:
        """(DLPack object to write to, handle for `finish`), on the device of `export(like)`."""

    def finish(self, handle: Any) -> Any:
        """The caller's tensor, once the memory has been written."""

    def to_host(self, tensor: Any, function: str, argument: str) -> Any:
        """A DLPack object with the same numbers in the CPU's memory, for small tables; raises if
        the tensor has no numbers now."""

    def check_writable(self, tensor: Any, function: str, argument: str) -> None:
        """Raises unless the tensor's memory may be written in place."""

    draw_seed: Callable[[], int] | None
    """A number below 2**63 from the framework's generator. None: it has none of its own."""

    def trains(self, tensors: Iterable[Any]) -> bool:
        """Whether a call on these tensors may be part of training. True if the framework does not
        tell."""

    in_stream: Callable[[Any], bool] | None
    """Whether the framework runs operations on a tensor later, in a stream of its own. None: a
    tensor's memory holds its value once `export` has been asked."""

    def stream(
        self, function: str, tensors: dict[str, Any], results: Sequence[str], obstacle: str = ""
    ) -> Any:
        """What queues a call in the stream of its tensors, for which `in_stream` is true.

        An object with `allocate`, in place of the framework's, `play`, as `_ext.attention_forward`
        takes it, and `warm_up`, as `_ext.attention_warm_up` does. None where umfa's own queue has
        to run the call, because of `obstacle` or for a reason of the framework's: what the
        framework has queued is done by then. `tensors` by their names in a plan; `results`: the
        names of what will be allocated.
        """

    reads_later: Callable[[Any], bool] | None
    """Whether a table may stay where it is, because a kernel of `stream` can read it. None: the
    host reads every table."""

    def mark_written(self, tensor: Any) -> None:
        """Tells the framework that the memory of a tensor has been written."""

    stand_ins: Callable[[Any, dict[str, Any]], tuple[Framework, dict[str, Any]]] | None
    """stand_ins(call, tensors) is (framework, tensors) that a verdict on the call can be given on:
    arrays of the same shapes in place of tensors that have no memory yet. None: all have some."""


FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The public functions by name, for graphs that hold a name."""

# Module of the tensor class -> class; jax tracers are jax.Array too.
_CLASSES = {"torch": "Tensor", "jax": "Array", "mlx.core": "array"}
_MODULES = {"torch": "torch", "jax": "jax", "mlx.core": "mlx"}
# Frameworks met so far, by name: their version has been checked.
_LOADED: dict[str, Framework] = {}
# Tensor types met so far, of frameworks that are known by name; few, so that it cannot grow.
_KNOWN: dict[type, Framework] = {}

known_framework: Callable[[type], Framework | None] = _KNOWN.get
"""The framework of a type that `framework_of` has met."""


def _name_of(tensor: Any) -> str | None:
    if isinstance(tensor, np.ndarray):
        return "numpy"
    for module, class_name in _CLASSES.items():
        loaded = sys.modules.get(module)
        # getattr: a module that is still being imported has no class yet.
        if loaded is not None and isinstance(tensor, getattr(loaded, class_name, ())):
            return _MODULES[module]
    return "dlpack" if hasattr(type(tensor), "__dlpack__") else None


def framework_of(
    function: str, tensors: dict[str, Any], written: tuple[str, ...] = ()
) -> Framework:
    """The one framework that all `tensors`, by argument name, belong to.

    Objects with Python's buffer protocol are replaced, in `tensors`, by NumPy arrays on their
    memory. `written`: the arguments that the call writes, which such objects cannot be.

    Raises
    ------
    TypeError
        An argument is no tensor, or they come from different frameworks.
    """
    kind = None
    for tensor in tensors.values():
        kind = type(tensor) if kind is None else kind
        if type(tensor) is not kind:
            break
    else:
        known = _KNOWN.get(kind) if kind is not None else None
        if known is not None:
            return known
    names: dict[str, str] = {}
    buffers: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = _name_of(tensor)
        if name is None and is_buffer(tensor):
            _check_only_read(function, key, tensor, written)
            buffers[key] = as_array(tensor, function, key)
            name = "numpy"
        if name is None:
            raise TypeError(
                message(
                    function,
                    f"{key} is not a tensor",
                    _short(tensor),
                    "a tensor of torch, numpy, jax, mlx or any DLPack library, or a buffer",
                )
            )
        names[key] = name
    first, name = next(iter(names.items()))
    for key in names:
        if names[key] != name:
            origin, other = (f"{names[x]}{' (a buffer)' * (x in buffers)}" for x in (first, key))
            raise TypeError(
                message(
                    function,
                    f"frameworks differ: {first} is of {origin}, {key} of {other}",
                    _short(tensors[key]),
                    f"a tensor of {name}",
                )
            )
    tensors.update(buffers)
    framework = _load(function, name)
    # A type of DLPack's may turn out to be of a framework that loads later.
    if name != "dlpack" and len(_KNOWN) < 64:
        _KNOWN[type(tensors[first])] = framework
    return framework


def _check_only_read(function: str, argument: str, buffer: Any, written: tuple[str, ...]) -> None:
    if argument in written:
        raise TypeError(
            message(
                function,
                f"{argument} is written in place, but buffers are read-only",
                _short(buffer),
                "a NumPy array, as numpy.asarray makes of a writable buffer",
            )
        )


def shape_of(tensor: Any) -> tuple[Any, ...] | None:
    """The shape of whatever an argument is; None where it has none."""
    try:
        shape = getattr(tensor, "shape", None)
        if shape is None and is_buffer(tensor):
            shape = memoryview(tensor).shape
        return None if shape is None else tuple(shape)
    except (RuntimeError, TypeError, ValueError):  # torch's nested tensors, closed buffers, ...
        return None


def _load(function: str, name: str) -> Framework:
    """The module here of that name; raises if the framework is too old for it."""
    framework = _LOADED.get(name)
    if framework is None:
        # First: the module imports what older releases may lack.
        check_version(function, name)
        framework = _LOADED[name] = cast(Framework, import_module(f"{__name__}._{name}"))
    return framework


def causal_bias(mask: Any) -> tuple[str, int, int] | None:
    """("top_left" or "bottom_right", seqlen_q, seqlen_kv) if `mask` is torch's CausalBias.

    Such a mask is a torch.Tensor by class only: its memory holds nothing.
    """
    bias: Any = sys.modules.get("torch.nn.attention.bias")
    if bias is None or not isinstance(mask, getattr(bias, "CausalBias", ())):
        return None
    mask = cast(Any, mask)
    corner = "top_left" if mask.variant is bias.CausalVariant.UPPER_LEFT else "bottom_right"
    return corner, mask.seq_len_q, mask.seq_len_kv


def _short(value: object) -> str:
    text = repr(value) if value is None or isinstance(value, (str, int, float)) else ""
    return text[:60] or f"{type(value).__module__}.{type(value).__qualname__}"
