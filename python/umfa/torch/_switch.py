"""Whether umfa is enabled, and what that installs."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.attention

from .._errors import UnsupportedError, message
from . import _kernels, _modules, _multihead, _nested, _overrides, _varlen

_lock = threading.Lock()
_callers: set[str] = set()
"""Which modules of umfa have enabled it."""
_blocks = 0
"""Blocks of `umfa.torch.sdpa` that are open, shims that are installed, and torch's activation."""


def enable(caller: str = "umfa.torch") -> None:
    with _lock:
        _callers.add(caller)
        _update()


def disable(caller: str | None = None) -> None:
    """For one caller; for all without it."""
    with _lock:
        if caller is None:
            _callers.clear()
        else:
            _callers.discard(caller)
        _update()


def is_enabled_by(caller: str) -> bool:
    return caller in _callers


def is_enabled() -> bool:
    return _kernels.switch.on


def enter() -> None:
    global _blocks
    with _lock:
        _blocks += 1
        _update()


def leave() -> None:
    global _blocks
    with _lock:
        _blocks -= 1
        _update()


def uninstall() -> None:
    with _lock:
        if _kernels.switch.on:
            got = f"{_blocks} open blocks, shims and activations"
            got += f"; enabled by {', '.join(sorted(_callers)) or 'none'}"
            expected = (
                "a call after umfa.torch.disable(), the end of umfa.torch.sdpa() blocks, "
                "Shim.remove() and torch's restore_flash_attention_impl()"
            )
            raise ValueError(message("umfa.torch.uninstall", "umfa is enabled", got, expected))
        _kernels.uninstall()


class Activation:
    """What torch holds while it has activated umfa."""

    def __init__(self) -> None:
        self._active = True
        enter()

    def remove(self) -> None:
        """Called by torch. A second call does nothing."""
        if self._active:
            self._active = False
            leave()


def register() -> None:
    registry: Any = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if registry is None:
        got, expected = f"torch {torch.__version__}", "register_flash_attention_impl"
        what = "this torch has no registry of flash attentions"
        raise UnsupportedError(message("umfa.torch.register", what, got, expected))
    registry("umfa", register_fn=Activation)


def _update() -> None:
    wanted = bool(_callers) or _blocks > 0
    if wanted == _kernels.switch.on:
        return
    if wanted:
        if not hasattr(torch.library, "get_kernel"):
            what = "this torch does not say which kernels it has, to call them where umfa cannot"
            got, expected = f"torch {torch.__version__}", "a torch with torch.library.get_kernel"
            raise UnsupportedError(message("umfa.torch.enable", what, got, expected))
        _kernels.install((*_overrides.OVERRIDES, *_varlen.OVERRIDES, *_multihead.OVERRIDES))
        _modules.install()
        _nested.install()
    else:
        _nested.remove()
        _modules.remove()
    _kernels.switch.on = wanted
