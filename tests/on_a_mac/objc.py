"""Messages to Objective-C objects, by ctypes: nothing to install, nothing to compile."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Id = ctypes.c_void_p
UInt = ctypes.c_ulong
Address = Callable[[str], int]


def of_macos() -> Address:
    """Addresses of functions in the system's libraries."""
    frameworks = "/System/Library/Frameworks/{0}.framework/{0}"
    # Metal finds no default device in a process without CoreGraphics.
    paths = ["/usr/lib/libobjc.A.dylib", "/usr/lib/libSystem.B.dylib"]
    paths += [frameworks.format(name) for name in ("CoreGraphics", "Foundation", "Metal")]
    libraries = [ctypes.CDLL(path) for path in paths]

    def address(name: str) -> int:
        for library in libraries:
            if hasattr(library, name):
                return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        return 0

    return address


def of_double() -> Address:
    """Addresses of the double's functions."""
    from tools.metal import double as metal_double

    lookup = metal_double.load().umfa_double_symbol
    lookup.restype, lookup.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
    return lambda name: lookup(name.encode()) or 0


class Runtime:
    """The Objective-C runtime of this process."""

    def __init__(self, address: Address | None = None) -> None:
        self._address = address or (of_macos() if sys.platform == "darwin" else of_double())
        self._message = self._address("objc_msgSend")
        self._selectors: dict[str, int] = {}

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
        """A C function, or None where there is none of this name."""
        address = self._address(name)
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def call(self, name: str, *arguments: Any, result: Any = Id) -> Any:
        """Call a C function that must be there; arguments are pointers."""
        function = self.function(name, result, *[ctypes.c_void_p] * len(arguments))
        if function is None:
            raise LookupError(f"no function {name}")
        return function(*arguments)

    def type(self, name: str) -> int:
        """A class."""
        found = self.call("objc_getClass", name.encode())
        if not found:
            raise LookupError(f"no class {name}")
        return int(found)

    def send(self, receiver: int, selector: str, *arguments: Any, result: Any = Id) -> Any:
        """Send a message. Arguments: ctypes values, or pointers as integers, bytes or None."""
        if selector not in self._selectors:
            self._selectors[selector] = self.call("sel_registerName", selector.encode())
        known = (ctypes._SimpleCData, ctypes.Structure)
        types = [type(a) if isinstance(a, known) else ctypes.c_void_p for a in arguments]
        function = ctypes.CFUNCTYPE(result, Id, Id, *types)(self._message)
        return function(receiver, self._selectors[selector], *arguments)

    def new(self, name: str) -> int:
        """A new object of a class, the caller's to release."""
        return int(self.send(self.type(name), "new"))

    def release(self, receiver: int | None) -> None:
        """Let go of an object."""
        if receiver:
            self.send(receiver, "release", result=None)

    def string(self, text: str) -> int:
        """An autoreleased NSString."""
        return int(self.send(self.type("NSString"), "stringWithUTF8String:", text.encode()))

    def text(self, string: int | None) -> str:
        """The text of an NSString."""
        if not string:
            return ""
        found = self.send(string, "UTF8String", result=ctypes.c_char_p)
        return (found or b"").decode(errors="replace")

    def error(self, error: int | None) -> str:
        """What an NSError says, in full."""
        if not error:
            return "no error from Metal"
        domain = self.text(self.send(error, "domain"))
        code = self.send(error, "code", result=ctypes.c_long)
        return f"{self.text(self.send(error, 'localizedDescription'))} ({domain} {code})"

    @contextmanager
    def pool(self) -> Iterator[None]:
        """What is autoreleased inside goes at the end."""
        pool = self.call("objc_autoreleasePoolPush")
        try:
            yield
        finally:
            self.call("objc_autoreleasePoolPop", pool, result=None)
