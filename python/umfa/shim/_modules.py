"""Modules in `sys.modules` that no file holds, and their removal."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from .._errors import UnsupportedError, message

_lock = threading.RLock()
FOLDERS = Path(__file__).parent / "path"
"""Files with the names of some of the modules, a folder for each shim: for processes that find
modules by ``PYTHONPATH``."""


class Shim:
    """Modules that umfa provides under other names, until `remove`; also a context manager.

    Attributes
    ----------
    function
        The function of `umfa.shim` that made it.
    names
        The modules' names.
    """

    def __init__(
        self,
        function: str,
        modules: Mapping[str, Mapping[str, Any]],
        *,
        begin: Callable[[], Callable[[], None]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.function = function
        self.names = tuple(modules)
        self._contents = modules
        self._begin, self._folder = begin, folder
        self._installed: dict[str, ModuleType] = {}
        self._earlier: dict[str, ModuleType] = {}
        self._end: Callable[[], None] | None = None

    def __repr__(self) -> str:
        state = "installed" if self._installed else "removed"
        return f"<{self.function}: {', '.join(self.names)}; {state}>"

    def install(self) -> Shim:
        """Put the modules in place. A second time changes nothing."""
        with _lock:
            if self._installed:
                return self
            for name in self.names:
                if "." not in name:
                    refuse_if_importable(self.function, name)
            if self._begin is not None:
                self._end = self._begin()
            self._installed = _made(self._contents)
            self._earlier = {x: sys.modules[x] for x in self.names if x in sys.modules}
            sys.modules.update(self._installed)
            if self._folder is not None:
                _put_before_path(str(self._folder))
        return self

    def remove(self) -> None:
        """Take the modules away. Functions that a program has imported meanwhile keep working."""
        with _lock:
            if not self._installed:
                return
            for name, module in self._installed.items():
                if sys.modules.get(name) is module:  # else somebody has replaced it meanwhile
                    del sys.modules[name]
            sys.modules.update(self._earlier)
            self._installed, self._earlier = {}, {}
            if self._folder is not None:
                _take_from_path(str(self._folder))
            if self._end is not None:
                self._end()
                self._end = None

    def __enter__(self) -> Shim:
        return self.install()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def refuse_if_importable(function: str, name: str) -> None:
    """Raises if `name` is somebody else's module."""
    there: Any = sys.modules.get(name) or importlib.util.find_spec(name)
    spec = there if isinstance(there, ModuleSpec) else getattr(there, "__spec__", None)
    origin = getattr(spec, "origin", None)
    if there is None or (origin and FOLDERS in Path(origin).parents):
        return
    what = f"{name} can be imported already, and umfa does not take its place"
    place = origin or getattr(spec, "submodule_search_locations", None) or there
    raise UnsupportedError(message(function, what, place, f"an environment without {name}"))


def _made(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, ModuleType]:
    """Modules with these contents. Each is an attribute of the module that its name says."""
    made: dict[str, ModuleType] = {}
    for name, content in contents.items():
        module = ModuleType(name, content.get("__doc__"))
        is_package = any(other.startswith(name + ".") for other in contents)
        # importlib.util.find_spec, which programs ask first, wants a spec.
        module.__spec__ = ModuleSpec(name, None, origin="umfa.shim", is_package=is_package)
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        module.__dict__.update(content)
        made[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made


def _put_before_path(folder: str) -> None:
    rest = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder + (os.pathsep + rest if rest else "")


def _take_from_path(folder: str) -> None:
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder in parts:
        parts.remove(folder)
    if parts:
        os.environ["PYTHONPATH"] = os.pathsep.join(parts)
    else:
        os.environ.pop("PYTHONPATH", None)
