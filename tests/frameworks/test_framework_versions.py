"""Releases of torch, jax, mlx and numpy that umfa does not work with are refused by name.

The old releases here are stand-ins: a module with a version and a class of tensors.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import umfa
from umfa import _frameworks
from umfa._frameworks import _versions

ROOT = Path(__file__).parents[2]
CLASSES = {"torch": "Tensor", "jax": "Array", "mlx.core": "array"}


class OldTensor:
    """A tensor of a framework of which nothing but the version is asked."""


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_frameworks, "_LOADED", {})
    monkeypatch.setattr(_frameworks, "_KNOWN", {})


def old_tensor(monkeypatch: pytest.MonkeyPatch, module: str, version: str) -> Any:
    stand_in = SimpleNamespace(__version__=version, **{CLASSES[module]: OldTensor})
    monkeypatch.setitem(sys.modules, module, stand_in)
    return OldTensor()


@pytest.mark.parametrize(
    ("module", "version", "expected"),
    [
        ("mlx.core", "0.30.6", "mlx is too old; got mlx 0.30.6; expected mlx >= 0.32"),
        ("mlx.core", "0.31.2", "mlx is too old; got mlx 0.31.2; expected mlx >= 0.32"),
        ("torch", "2.8.0+cu126", "torch is too old; got torch 2.8.0+cu126; expected torch >= 2.9"),
        ("torch", "1.13.1", "torch is too old; got torch 1.13.1; expected torch >= 2.9"),
        ("jax", "0.4.38", "jax is too old; got jax 0.4.38; expected jax >= 0.5"),
    ],
)
def test_old_frameworks_are_refused(
    module: str, version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_tensor(monkeypatch, module, version)
    for function in (umfa.flash_attn_func, umfa.scaled_dot_product_attention):
        with pytest.raises(umfa.UnsupportedError) as caught:
            function(old, old, old)
        assert str(caught.value) == f"[umfa.{function.__name__}] {expected}"
    with pytest.raises(umfa.UnsupportedError, match="too old"):
        umfa.flash_attn_qkvpacked_func(old)
    assert umfa.can_run(old, old, old) == (False, f"[umfa.can_run] {expected}")


def test_an_old_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = old_tensor(monkeypatch, "mlx.core", "0.31.2")
    x = np.zeros((4, 2, 8), np.float32)
    with pytest.raises(umfa.UnsupportedError, match=r"got mlx 0\.31\.2"):
        umfa.flash_attn_varlen_func(x, x, x, old, old, 4, 4)


def test_old_numpy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", "1.23.5")
    x = np.zeros((1, 4, 2, 8), np.float32)
    assert umfa.can_run(x, x, x) == (
        False,
        "[umfa.can_run] numpy is too old; got numpy 1.23.5; expected numpy >= 1.24",
    )


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.0.dev20260601+ab12", "0.100", "1", "unknown", ""]
)
def test_what_is_not_older_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old_tensor(monkeypatch, "mlx.core", version)
    _versions.check_version("umfa.f", "mlx")


def test_a_refused_framework_stays_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = old_tensor(monkeypatch, "jax", "0.4.38")
    for _ in range(2):
        assert not umfa.can_run(old, old, old)[0]
    assert _frameworks._KNOWN == {}


def requirements(section: str) -> list[tuple[str, tuple[int, ...]]]:
    """(package, oldest release) of a list in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^{section} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r'^\s*"([\w-]+)(?:\[\w+\])?>=([\d.]+)', block, re.MULTILINE)
    return [(name, tuple(map(int, version.split(".")))) for name, version in found]


def test_the_package_asks_for_the_same_releases() -> None:
    asked = [
        (name, floor)
        for section in ("dependencies", "frameworks")
        for name, floor in requirements(section)
        if name in _versions.FLOORS
    ]
    assert {name for name, _ in asked} == set(_versions.FLOORS)
    assert [pair for pair in asked if _versions.FLOORS[pair[0]] != pair[1]] == []


def test_the_readme_names_the_same_releases() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"umfa works with (.*?), and refuses older", text, re.DOTALL)
    found = re.findall(r"(\w+) ≥ ([\d.]*\d)", sentence)
    named = {name.lower(): tuple(map(int, version.split("."))) for name, version in found}
    named["torch"] = named.pop("pytorch")
    assert named == _versions.FLOORS
