"""umfa's kernels in torch's dispatcher: registered once in a process, and switched by a flag.

The dispatcher does not allow a kernel to be replaced while another thread calls it. So the first
`umfa.torch.enable` registers, and enabling and disabling afterwards only sets `switch.on`, which
every call reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from .. import _ext

Kernel = Callable[..., Any]
"""Takes the dispatcher's set of keys, then the arguments of the operation."""


class Switch:
    """What every call of a registered kernel reads."""

    on = False


switch = Switch()
_library: Any = None
_operations: list[Any] = []


class Override(NamedTuple):
    """A kernel for one of torch's operations."""

    operation: str
    """Its name in ``torch.ops.aten``."""
    keys: tuple[str, ...]
    """Dispatch keys at which to register it."""
    make: Callable[[Any], Kernel]
    """Makes umfa's kernel, given what is registered now: a `Stock`, or torch's own object."""


class Stock:
    """Stands for torch's kernel where it has none: raises torch's own error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def call_boxed(self, *args: Any, **kwargs: Any) -> Any:
        raise type(self.error)(*self.error.args)


class Below:
    """What torch runs after a kernel at BackendSelect.

    The dispatcher comes to this key before the device's, also in inference mode, which excludes
    autograd's. A kernel at the key of the device instead would change graphs, umfa disabled or not:
    torch's recorders decompose an operation only where no device has a kernel of its own.
    """

    def __init__(self, operation: str) -> None:
        self._operation: Any = getattr(torch.ops.aten, operation).default
        self.for_cpu = torch.library.get_kernel(f"aten::{operation}", "CPU").call_boxed
        """The same for CPU tensors, 1 us faster."""
        self._after = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def call_boxed(self, keys: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
        if first.is_cpu:
            return self.for_cpu(keys, first, *args, **kwargs)
        return self._operation.redispatch(keys & self._after, first, *args, **kwargs)


def exists(operation: str) -> bool:
    """Whether this torch has the operation."""
    return hasattr(torch.ops.aten, operation)


def install(overrides: Iterable[Override]) -> None:
    """Registers all that this torch has operations for, unless that was done before."""
    global _library
    if _library is not None:
        return
    made = [
        (x.operation, key, _switched(*_kernels(x, key)))
        for x in overrides
        if exists(x.operation)
        for key in x.keys
    ]
    make_library: Any = torch.library.Library  # its methods carry no annotations
    _library = make_library("aten", "IMPL")
    with warnings.catch_warnings():  # torch warns that its kernel is replaced
        warnings.simplefilter("ignore")
        for operation, key, kernel in made:
            _library.impl(operation, kernel, key, with_keyset=True, allow_override=True)
    _operations[:] = {operation for operation, _, _ in made}
    _forget()


def uninstall() -> None:
    """Removes what `install` registered."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
        _forget()


def _kernels(override: Override, key: str) -> tuple[Any, Kernel]:
    """(torch's, umfa's)"""
    stock: Any
    try:
        if key == "BackendSelect":
            stock = Below(override.operation)
        else:
            stock = torch.library.get_kernel(f"aten::{override.operation}", key)
    except RuntimeError:  # there is none for this key
        stock = Stock(_error_of(override.operation, key))
    return stock, override.make(stock)


def _switched(stock: Any, ours: Kernel) -> Kernel:
    for_cpu = stock.for_cpu if isinstance(stock, Below) else None
    return _ext.switched(switch, ours, stock.call_boxed, for_cpu)


_EXAMPLES: dict[str, Any] = {"int": 0, "SymInt": 0, "float": 0.0, "bool": False}


def _error_of(operation: str, key: str) -> Exception:
    """What torch raises for an operation without a kernel."""
    found: Any = getattr(torch.ops.aten, operation).default
    given = [
        _EXAMPLES.get(str(argument.real_type))
        if "Tensor" not in str(argument.real_type)
        else torch.empty(0)
        for argument in found._schema.arguments
        if not argument.has_default_value()
    ]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    try:
        found.redispatch(keys, *given)
    except NotImplementedError as error:
        return error
    raise AssertionError(f"{operation} has a kernel for {key} that get_kernel does not know")


def _forget() -> None:
    """Python's operations keep what the dispatcher once said of their keys, for FakeTensors."""
    for operation in _operations:
        cache = getattr(getattr(torch.ops.aten, operation).default, "_dispatch_cache", None)
        if cache is not None:
            cache.clear()
