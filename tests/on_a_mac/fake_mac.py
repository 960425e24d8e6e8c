"""pytest plugin: collect as on a Mac with Apple silicon, and write what would happen to a file.

``-p fake_mac --fake-mac REPORT`` with ``--collect-only``. With ``--fake-gpu`` the Mac has a GPU
that umfa can use, else the one of hosted Macs.
"""

from __future__ import annotations

# Whatever looks at sys.platform when it is imported must have been imported.
import contextlib
import ctypes.util  # noqa: F401
import importlib
import json
import multiprocessing.pool  # noqa: F401
import platform
import subprocess  # noqa: F401
import sys
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401
import ml_dtypes  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import xdist  # noqa: F401

import umfa

for library in ("torch", "jax", "mlx.core", "huggingface_hub.hf_api"):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(library)

PARAVIRTUAL = (
    "Apple Paravirtual device is older than GPU family Apple7 (M1), whose matrix operations umfa "
    "uses, or a virtual machine's"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fake-mac", type=Path, required=True)
    parser.addoption("--fake-gpu", action="store_true")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    assert early_config.known_args_namespace.collectonly, "a fake Mac runs nothing"
    has_gpu = early_config.known_args_namespace.fake_gpu
    cpu = [backend for backend in umfa.backends() if backend.name == "cpu"]
    metal = umfa.BackendInfo("metal", has_gpu, "" if has_gpu else PARAVIRTUAL, "Apple M1")
    vars(umfa)["backends"] = lambda: [metal, *cpu]
    vars(sys)["platform"] = "darwin"
    vars(platform)["machine"] = lambda: "arm64"
    vars(platform)["system"] = lambda: "Darwin"


def skip_reasons(item: pytest.Item) -> list[str]:
    reasons = [mark.kwargs["reason"] for mark in item.iter_markers("skip")]
    for mark in item.iter_markers("skipif"):
        assert not isinstance(mark.args[0], str), item.nodeid
        if mark.args[0]:
            reasons.append(mark.kwargs["reason"])
    return reasons


def pytest_collection_finish(session: pytest.Session) -> None:
    report: list[dict[str, Any]] = []
    for item in session.items:
        parameters = getattr(item, "callspec", None)
        values = parameters.params if parameters else {}
        report.append(
            {
                "name": item.nodeid,
                "backend": values.get("backend"),
                "framework": values.get("framework"),
                "marks": sorted({mark.name for mark in item.iter_markers()}),
                "skipped": skip_reasons(item),
            }
        )
    session.config.known_args_namespace.fake_mac.write_text(json.dumps(report))
