"""The name of a backend: in a call, and in the environment."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import umfa
from tests import mac
from tests.capsules import DlpackObject

X = np.zeros((1, 8, 2, 16), np.float32)
CALL = """
import numpy as np, umfa
x = np.zeros((1, 8, 2, 16), np.float32)
def outcome(**options):
    try:
        umfa.flash_attn_func(x, x, x, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"
"""


@pytest.fixture
def without_metal() -> None:
    if not mac.missing_gpu():
        pytest.skip("this Mac has a GPU that umfa can use")


WITHOUT_METAL = pytest.mark.usefixtures("without_metal")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gpu", "'gpu'"),
        ("Metal", "'Metal'"),
        ("", "''"),
        ("métal", "'métal'"),
        ("cpu\0", r"'cpu\x00'"),
        ("\ud800", r"'\ud800'"),
        ("cpu\n", r"'cpu\n'"),
    ],
    ids=ascii,
)
def test_a_name_that_no_backend_has(name: str, shown: str) -> None:
    text = f"backend is unknown; got {shown}; expected 'auto', 'metal' or 'cpu'"
    with pytest.raises(ValueError, match="^" + re.escape(f"[umfa.flash_attn_func] {text}") + "$"):
        umfa.flash_attn_func(X, X, X, backend=name)
    assert umfa.can_run(X, X, X, backend=name) == (False, f"[umfa.can_run] {text}")


def test_a_name_without_end_is_cut() -> None:
    with pytest.raises(
        ValueError, match=r"backend is unknown; got 'x+\.\.\.x+'; expected"
    ) as caught:
        umfa.flash_attn_func(X, X, X, backend="x" * 100_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [None, b"cpu", 1])
def test_what_is_no_name(value: Any) -> None:
    text = f"backend is not a string; got {value!r}; expected 'auto', 'metal' or 'cpu'"
    with pytest.raises(TypeError, match=re.escape(text)):
        umfa.flash_attn_func(X, X, X, backend=value)
    assert umfa.can_run(X, X, X, backend=value) == (False, f"[umfa.can_run] {text}")


@WITHOUT_METAL
def test_metal_where_there_is_none(run_python: Any) -> None:
    process = run_python(CALL + "print(outcome(backend='metal'))")
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(
        r"UnsupportedError: \[umfa\.flash_attn_func\] the backend cannot run this \(metal: .+\); "
        r"got backend 'metal'; expected 'auto', or what that backend supports\n",
        process.stdout,
    )


@WITHOUT_METAL
def test_nobody_can() -> None:
    metal = DlpackObject((1, 8, 2, 16), device_type=8)  # where no backend of this machine can look
    with pytest.raises(umfa.UnsupportedError) as caught:
        umfa.flash_attn_func(metal, metal, metal)
    assert re.fullmatch(
        r"\[umfa\.flash_attn_func\] no backend can run this \(metal: .+; cpu: the tensors are on "
        r"metal.*\); got backend 'auto'; expected what one of the backends supports",
        str(caught.value),
    )


@pytest.mark.parametrize("text", ["", "auto", "cpu"])
def test_the_environment_chooses(text: str, run_python: Any) -> None:
    process = run_python(
        CALL + "print(outcome(), umfa.stats().cpu_calls, umfa.can_run(x, x, x))",
        UMFA_BACKEND=text,
    )
    assert process.stdout == "done 1 (True, '')\n", process.stderr


@WITHOUT_METAL
def test_the_environment_insists_and_a_call_overrules_it(run_python: Any) -> None:
    process = run_python(
        CALL + "print(outcome()); print(umfa.can_run(x, x, x)[0]); print(outcome(backend='cpu'))",
        UMFA_BACKEND="metal",
    )
    first, possible, named = process.stdout.splitlines()
    assert "the backend cannot run this (metal: " in first
    assert "; got backend 'metal' by UMFA_BACKEND; expected " in first
    assert (possible, named) == ("False", "done")


def test_the_environment_names_no_backend(run_python: Any) -> None:
    process = run_python(
        CALL + "print(outcome()); print(umfa.can_run(x, x, x)); print(outcome(backend='cpu'))",
        UMFA_BACKEND="gpu",
    )
    text = (
        "[umfa] UMFA_BACKEND is not a known backend; got 'gpu'; expected 'auto', 'metal' or 'cpu'"
    )
    assert process.stdout.splitlines() == [f"ValueError: {text}", str((False, text)), "done"]


def test_the_environment_has_an_impossible_self_test(run_python: Any) -> None:
    """Refused on every machine, also where there is no GPU to test."""
    process = run_python(
        CALL + "print(outcome()); print(umfa.can_run(x, x, x)); print(outcome(backend='cpu'));"
        "print(umfa.backends()[0].reason)",
        UMFA_SELF_TEST="9",
    )
    text = "[umfa] UMFA_SELF_TEST is wrong; got '9'; expected '0', '1' or 'force'"
    assert process.stdout.splitlines() == [
        f"ValueError: {text}", str((False, text)), "done", text,
    ]  # fmt: skip
