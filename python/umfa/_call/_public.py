"""Makes a public function of the description of one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

from .._ext import Attention, Function
from .combine import Combination
from .run import Prepared, prepared, run, run_prepared

P = ParamSpec("P")

BODIES: dict[Callable[..., Any], Callable[..., Attention | Combination]] = {}
"""Of each public function, what makes the record of its arguments: `can_run` asks about that."""


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
        return call

    return decorate


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
        attention = body(*args, **kwargs)
        result = run(attention)
        return result if finish is None else finish(attention, result)

    return call


def _reusing(body: Callable[P, Attention]) -> Callable[P, Any]:
    made: dict[tuple[Any, ...], Prepared] = {}

    # What a call costs beyond the work is mostly here: 2 of 5 us went into checking options anew.
    @functools.wraps(body)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        key = _key(kwargs) if len(args) == 3 else None
        if key is None:
            return run(body(*args, **kwargs))
        known = made.get(key)
        if known is not None:
            return run_prepared(known, args)
        attention = body(*args, **kwargs)
        result = run(attention)
        options = attention.options
        if not (options.lacks_seed or options.return_attn_probs) and len(made) < 256:
            made[key] = prepared(options)
        return result

    return call


_PLAIN = frozenset((bool, int, float, str, type(None)))


def _key(options: dict[str, Any]) -> tuple[Any, ...] | None:
    """Equal for equal options. None if there is something else among them, such as a tensor."""
    key: list[Any] = []
    for name, value in options.items():
        kind = type(value)
        # Types too: True == 1 == 1.0, and not all of them are right.
        if kind is tuple:
            key += map(type, value)
            if not _PLAIN.issuperset(key[-len(value) :]):
                return None
        elif kind not in _PLAIN:
            return None
        key += (name, kind, value)
    return tuple(key)
