"""umfa first, torch where umfa refuses a call; counted either way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .._attempt import refusal
from .._errors import UnsupportedError
from .._frameworks import _torch_autodiff
from .._stats import count_left, count_taken


class Thread(threading.local):
    """State of one thread."""

    stock = False
    """A call was refused, and runs on torch's kernels."""


thread = Thread()

listeners: list[Callable[[str, Any], None]] = []
"""Told of each call that umfa computed with its result, and of each that torch computed with None;
not of those that are recorded in a graph."""


def attempt(operation: str, ours: Callable[[], Any], stock: Callable[[], Any] | None) -> Any:
    """umfa's result; torch's where umfa refuses the call. Without `stock`, torch cannot compute
    the call, and umfa's error is raised."""
    if thread.stock and stock is not None:
        return stock()
    try:
        result = ours()
    except (UnsupportedError, ValueError, TypeError) as error:
        reason = refusal(error)
        if stock is None or reason is None:
            raise
        count_left(f"torch.{operation}", reason)
        for listen in listeners:
            listen(operation, None)
        thread.stock = True
        try:
            return stock()
        finally:
            thread.stock = False
    if _torch_autodiff.records():
        count_taken(f"torch.{operation}, recorded in a graph")
        return result
    return computed(operation, result)


def computed(operation: str, result: Any) -> Any:
    """The result that umfa has computed of a call that is not recorded."""
    for listen in listeners:
        listen(operation, result)
    count_taken("torch." + operation)
    return result


@contextmanager
def plainly(like: Any) -> Iterator[None]:
    """Without autograd and autocast, which show the caller's state also below them."""
    device = like.device.type
    cast = torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if cast else nullcontext():
        yield
