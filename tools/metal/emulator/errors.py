"""What can go wrong, as exceptions."""

from __future__ import annotations


class EmulatorError(Exception):
    """Base of all errors of the emulator."""


class SourceError(EmulatorError):
    """The text is not Metal: a rule of the language that clang or the linter found broken.

    ``rules`` names the rules of the linter, in order; it is empty when clang spoke.
    """

    def __init__(self, message: str, rules: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.rules = rules


class DispatchError(EmulatorError):
    """The dispatch does not fit the kernel: unknown name, missing buffer, bad size."""


class KernelError(EmulatorError):
    """A check fired while the kernel ran; ``check`` is its name, ``location`` file:line, that of
    the kernel where no closer one is known."""

    def __init__(self, check: str, kernel: str, location: str, message: str) -> None:
        where = f"{location}: " if location else ""
        super().__init__(f"{where}{check} in kernel '{kernel}': {message}")
        self.check = check
        self.kernel = kernel
        self.location = location
