"""umfa first, another library's function where umfa refuses a call; counted either way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ._errors import UnsupportedError
from ._stats import count_left, count_taken


def refusal(error: Exception) -> str | None:
    """The reason that umfa's error gives, without the name of its function; None if the error is
    not umfa's."""
    text = str(error)
    return re.sub(r"^\[umfa\.[\w.]+\] ", "", text) if text.startswith("[umfa.") else None


def attempt(where: str, ours: Callable[[], Any], stock: Callable[[], Any]) -> Any:
    """umfa's result; that of `stock` where umfa refuses the call, whose own error then says what is
    wrong with it, if something is. `where` is the name of the function in `umfa.stats`."""
    try:
        result = ours()
    except (UnsupportedError, ValueError, TypeError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        count_left(where, reason)
        return stock()
    count_taken(where)
    return result
