"""From a function's arguments to the core: the only package that runs `umfa._ext`'s operations."""

from ._public import public, repeated

__all__ = ["public", "repeated"]
