"""Dropout outside training warns once, unless the call has a seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import umfa
from tests import array_libraries
from tests.array_libraries import Framework
from tests.cases import normal
from umfa._call import run

X = normal((1, 4, 2, 8), seed=0)
TEXT = r"^\[umfa\.\w+\] weights are dropped at random outside training; got dropout_p=0\.5 without"

pytestmark = pytest.mark.usefixtures("nothing_said")


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_SAID", set())


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return found


@pytest.mark.parametrize("framework", ["numpy", "torch"], indirect=True)
def test_once(framework: Framework) -> None:
    x = framework.tensor(X)
    calls = [
        lambda: umfa.flash_attn_func(x, x, x, 0.5),
        lambda: umfa.flash_attn_func(x, x, x, dropout_p=0.5, causal=True),
        lambda: umfa.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ]
    (found,) = warned(lambda: [call() for call in calls * 3])
    assert found.category is UserWarning
    assert found.filename == __file__  # points at the caller
    run._SAID.clear()
    with pytest.warns(UserWarning, match=TEXT):
        calls[2]()


def test_once_in_a_process(run_python: Any) -> None:
    script = """
import numpy as np, umfa
x = np.ones((1, 4, 2, 8), np.float32)
for _ in range(3):
    umfa.flash_attn_func(x, x, x, 0.25)
    umfa.flash_attn_qkvpacked_func(np.ones((1, 4, 3, 2, 8), np.float32), 0.25)
"""
    process = run_python(script)
    assert process.returncode == 0
    assert process.stderr.count("UserWarning") == 1, process.stderr
    assert "dropout_p=0 for inference" in process.stderr


def test_not_without_dropout_or_with_a_seed(framework: Framework) -> None:
    x = framework.tensor(X)
    assert not warned(lambda: umfa.flash_attn_func(x, x, x, 0.0))
    assert not warned(lambda: umfa.flash_attn_func(x, x, x, 0.5, dropout_seed=0))
    assert not warned(lambda: umfa.can_run(x, x, x, 0.5))


def test_not_where_the_framework_does_not_tell() -> None:
    mlx = pytest.importorskip("mlx.core")
    x = mlx.array(X)
    assert not warned(lambda: umfa.flash_attn_func(x, x, x, 0.5))


def test_not_in_training() -> None:
    torch = array_libraries.load("torch").module
    x, trained = torch.from_numpy(X), torch.from_numpy(X).requires_grad_()

    assert not warned(lambda: umfa.flash_attn_func(x, trained, x, 0.5))
    from umfa._frameworks import _torch

    assert _torch.trains([x, trained])
    assert not _torch.trains([x, x])
    with torch.no_grad():
        assert not _torch.trains([x, trained])
        assert len(warned(lambda: umfa.flash_attn_func(x, trained, x, 0.5))) == 1


def test_a_refused_call_does_not_warn() -> None:
    def refused() -> None:
        with pytest.raises(ValueError, match="seqlen differs"):
            umfa.flash_attn_func(X, X, X[:, :1], 0.5)

    assert not warned(refused)


def test_a_warning_that_is_an_error_stays_one_and_draws_nothing() -> None:
    before = np.random.get_state()[1].copy()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=TEXT):
                umfa.flash_attn_func(X, X, X, 0.5)
    assert np.array_equal(np.random.get_state()[1], before)
