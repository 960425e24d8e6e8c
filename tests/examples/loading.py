"""Examples as modules: they are programs in a folder that is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """``examples/<name>.py``, which may import its neighbours as it does when it is run."""
    specification = importlib.util.spec_from_file_location(
        f"umfa_example_{name}", FOLDER / f"{name}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look it up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        specification.loader.exec_module(module)
    return module
