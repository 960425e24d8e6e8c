"""The stubs that the build makes are what type checkers see: a change must show in a diff."""

from pathlib import Path

import pytest

import umfa

GOLDEN = Path(__file__).with_name("_ext.pyi.ref")


def test_generated_stub_equals_golden() -> None:
    generated = Path(umfa.__file__).with_name("_ext.pyi")
    if not generated.exists():
        pytest.skip("this build (sanitizers) makes no stubs")
    assert generated.read_text() == GOLDEN.read_text(), (
        f"the interface of umfa._ext changed: if that is meant, copy {generated} to {GOLDEN}"
    )


def test_package_is_marked_as_typed() -> None:
    assert Path(umfa.__file__).with_name("py.typed").exists()
