"""The oldest release of each framework that umfa works with; older ones are refused by name."""

from __future__ import annotations

import re
import sys

from .._errors import UnsupportedError, message

# pyproject.toml asks for the same.
FLOORS: dict[str, tuple[int, ...]] = {
    "numpy": (1, 24),
    "torch": (2, 9),  # the first whose tensors on MPS speak DLPack
    "jax": (0, 5),
    "mlx": (0, 32),  # the first with from_dlpack and __dlpack__(dl_device=...)
}
_MODULES = {"mlx": "mlx.core"}


def release(version: str) -> tuple[int, ...]:
    """(2, 9, 1) for "2.9.1+cpu"; empty if `version` does not start with a number.

    A pre-release counts as its release: source builds of mlx are named 0.32.0.dev… at the release
    itself.
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def check_version(function: str, name: str) -> None:
    """Raises if the framework called `name`, which the caller has imported, is too old.

    A version that is not a number cannot be compared, and is accepted.
    """
    floor = FLOORS.get(name)
    version = str(getattr(sys.modules.get(_MODULES.get(name, name)), "__version__", ""))
    found = release(version)
    if floor is not None and found and found < floor:
        raise UnsupportedError(
            message(
                function,
                f"{name} is too old",
                f"{name} {version}",
                f"{name} >= {'.'.join(map(str, floor))}",
            )
        )
