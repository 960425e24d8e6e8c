"""What torch.compile puts into its graph in place of a call: a function that it does not look into,
but runs on FakeTensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.bias import CausalBias

from . import FUNCTIONS


def _own_lists(value: Any) -> Any:
    """Python's lists in place of those of the graph, which are of a subclass."""
    if isinstance(value, list):
        return [_own_lists(x) for x in value]
    return value


_compiler: Any = torch.compiler  # its functions carry no annotations


@_compiler.disable(reason="umfa calls C++")  # type: ignore[untyped-decorator]
def _outside(name: str, *args: Any, **kwargs: Any) -> Any:
    return FUNCTIONS[name](
        *map(_own_lists, args), **{key: _own_lists(value) for key, value in kwargs.items()}
    )


@_compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_graph(name: str, *args: Any, **kwargs: Any) -> Any:
    # Disabled inside: what cannot be in a graph runs here too, after a break of the graph.
    return _outside(name, *args, **kwargs)


def inlined(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Traced by torch.compile in place of the function of that name."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, CausalBias):  # the graph would have it as a tensor without its meaning
            return _outside(name, *args, **kwargs)
    return _in_graph(name, *args, **kwargs)
