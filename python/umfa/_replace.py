"""A function of another library's that umfa replaces for a while, when others may do so too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Replaced = Callable[..., Any]


class Replacement:
    """Puts umfa's function in the place of another library's, and takes it out again.

    Another program may wrap umfa's function while it is installed. Then `remove` cannot take it
    out, because the wrapper still calls it: it only calls the stock function from then on. A later
    `install` wraps what it finds with a new function, so that none ever calls itself.
    """

    def __init__(self, holder: Any, name: str, make: Callable[[Replaced], Replaced]) -> None:
        """`make` makes umfa's function, given the one to call where umfa refuses."""
        self._holder, self._name, self._make = holder, name, make
        self._now: _Function | None = None

    @property
    def installed(self) -> bool:
        return self._now is not None

    def install(self) -> Replaced:
        """Returns the function that was put in place. A second time changes nothing."""
        if self._now is None:
            stock = getattr(self._holder, self._name)
            self._now = _Function(stock, self._make(stock))
            setattr(self._holder, self._name, self._now.call)
        return self._now.call

    def remove(self) -> None:
        if self._now is None:
            return
        self._now.on = False
        if getattr(self._holder, self._name) is self._now.call:
            setattr(self._holder, self._name, self._now.stock)
        self._now = None


class _Function:
    """One function that was put in place. `call` is a plain function, as torch's compilers want."""

    def __init__(self, stock: Replaced, ours: Replaced) -> None:
        self.stock = stock
        self.on = True

        def call(*args: Any, **kwargs: Any) -> Any:
            return (ours if self.on else stock)(*args, **kwargs)

        self.call: Replaced = call
