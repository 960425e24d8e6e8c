"""From a function's arguments to the core: the only package that runs `umfa._ext`'s operations."""

from ._public import public

__all__ = ["public"]
