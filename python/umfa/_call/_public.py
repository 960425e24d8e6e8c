"""Makes a public function of the description of one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec, cast

from .._errors import UnsupportedError, message
from .._ext import Attention, Function, Options, Repeated
from .._frameworks import FUNCTIONS, shape_of
from .combine import Combination
from .prepared import Prepared, prepared
from .run import run, run_prepared

P = ParamSpec("P")

BODIES: dict[Callable[..., Any], Callable[..., Attention | Combination]] = {}
"""Of each public function, what makes the record of its arguments, for `can_run` and `warmup`."""


def public(
    function: Function,
    *,
    packed: tuple[str, ...] = (),
    others: frozenset[str] = frozenset(),
    finish: Callable[[Attention, Any], Any] | None = None,
    reuse: bool = False,
) -> Callable[[Callable[P, Attention]], Callable[P, Any]]:
    """The function that runs the record which the decorated one returns.

    Parameters
    ----------
    packed
        Parameters that hold several fields of `Attention`.
    others
        Parameters that may be there and are no fields: hints about speed, and what is refused.
    finish
        Makes of the record and of `run`'s result what the function returns.
    reuse
        Whether query, key and value are the first three parameters, passed on as they are. A call
        with three tensors then looks its options up in those of earlier calls.

    Raises
    ------
    TypeError
        At import: the signature has a parameter that the record has no field for.
    """

    def decorate(body: Callable[P, Attention]) -> Callable[P, Any]:
        _check_parameters(function, body, {*packed, *others})
        call = _reusing(body) if reuse else _plain(body, finish)
        BODIES[call] = body
        FUNCTIONS[function.name] = call
        _show_to_dynamo(function.name, call, body)
        return call

    return decorate


_REPEATED: dict[Callable[..., Any], Repeated] = {}
"""The options that each public function has met, if it reuses them."""


def repeated(function: Callable[..., Any], tensors: tuple[Any, ...], options: Any) -> Any:
    """The result of ``function(*tensors, **options)`` if the binding computes it alone, else None.

    Also None for arguments that `function` refuses, since a call of it raises the error, and for a
    function that `public` has not made with ``reuse=True``.
    """
    known = _REPEATED.get(function)
    if known is None:
        return None
    try:
        found = known.run(tensors, options)
    except (UnsupportedError, ValueError, TypeError):
        return None
    return None if found is False or type(found) is Prepared else found


def called(asking: str, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, its arguments) of ``asking(function, ...)``, or of ``asking(q, k, v, ...)``, which
    means `flash_attn_func`.

    Raises
    ------
    TypeError
        The first argument is a function that is not in `BODIES`.
    """
    if not (args and callable(args[0]) and shape_of(args[0]) is None):
        return next(x for x in BODIES if x.__name__ == "flash_attn_func"), args
    if not isinstance(args[0], FunctionType) or args[0] not in BODIES:
        expected = "a function of umfa that computes, or tensors for flash_attn_func"
        got = getattr(args[0], "__qualname__", type(args[0]).__qualname__)
        raise TypeError(message(asking, "the function is not known", got, expected))
    return args[0], args[1:]


def _check_parameters(function: Function, body: Callable[..., Any], others: set[str]) -> None:
    known = {*function.parameters, *others, "backend"}
    unknown = [name for name in inspect.signature(body).parameters if name not in known]
    if unknown:
        raise TypeError(
            f"{function.name} has parameters that its record has no field for: {unknown}; "
            f"options are defined in src/core/options.def"
        )


def _plain(
    body: Callable[P, Attention], finish: Callable[[Attention, Any], Any] | None
) -> Callable[P, Any]:
    @functools.wraps(body)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        if finish is None:
            return run(body(*args, **kwargs))
        return _run_and_finish(body(*args, **kwargs), finish)

    return call


def _run_and_finish(attention: Attention, finish: Callable[[Attention, Any], Any]) -> Any:
    return finish(attention, run(attention))


def _reusing(body: Callable[P, Attention]) -> Callable[P, Any]:
    known = Repeated()

    # Most of a tiny call's overhead is here. A call with known options and plain tensors is done
    # when `_repeat` returns.
    @functools.wraps(body)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        found = _repeat(known, args, kwargs)
        if found is False:
            return run(body(*args, **kwargs))
        if found is None:
            return _run_first(body(*args, **kwargs), known, kwargs)
        if type(found) is Prepared:
            return run_prepared(found, args)
        return found

    _REPEATED[call] = known
    return call


def _repeat(known: Repeated, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return known.run(args, kwargs)


def _run_first(attention: Attention, known: Repeated, kwargs: dict[str, Any]) -> Any:
    """Runs a call, and keeps its options for later ones."""
    result = run(attention)
    options = attention.options
    if not (options.lacks_seed or options.return_attn_probs):
        known.keep(kwargs, options, prepared(options))
    return result


# ---- torch.compile -------------------------------------------------------------------------------

# torch.compile cannot trace into C++. It takes what it finds by this attribute for what it is to
# trace in a function's place. That costs a plain call nothing, and needs no torch.
_INLINED = "_torchdynamo_inline"


class _Deferred:
    """The arguments of a call, in place of a record."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs
        self.record: Attention | None = None

    # `run` asks for these where something breaks the graph before it.
    @property
    def options(self) -> Options:
        return self._made().options

    @property
    def tensors(self) -> dict[str, Any]:
        return self._made().tensors

    def _made(self) -> Attention:
        if self.record is None:
            self.record = cast(Attention, BODIES[FUNCTIONS[self.name]](*self.args, **self.kwargs))
        return self.record


def _trace(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from .._frameworks._torch_compile import inlined

    return inlined(name, args, kwargs)


def _show_to_dynamo(name: str, call: Callable[..., Any], body: Callable[..., Any]) -> None:
    def traced(*args: Any, **kwargs: Any) -> Any:
        return _trace(name, args, kwargs)

    # The body is what dynamo traces first where it compiles `call` itself, and not a function that
    # calls it. What takes the record then takes the arguments.
    def deferred(*args: Any, **kwargs: Any) -> _Deferred:
        return _Deferred(name, args, kwargs)

    setattr(call, _INLINED, traced)
    setattr(body, _INLINED, deferred)


def _trace_deferred(attention: _Deferred, *_: Any) -> Any:
    return _trace(attention.name, attention.args, attention.kwargs)


for _function in (run, _run_and_finish, _run_first):
    setattr(_function, _INLINED, _trace_deferred)
setattr(run_prepared, _INLINED, lambda call, given: _trace(call.function, given, {}))
setattr(_repeat, _INLINED, lambda *_: False)  # `run` is what takes the options
