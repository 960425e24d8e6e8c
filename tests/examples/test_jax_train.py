"""examples/jax_train.py: training with umfa is training with jax.nn's attention."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

import umfa
from tests.examples.loading import load


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("jax")
    return load("jax_train")


@pytest.mark.parametrize("window", [None, 16])
def test_the_losses_agree_and_fall(example: ModuleType, window: int | None) -> None:
    recipe = example.Recipe(steps=12, batch=2, seqlen=64, window=window)
    before = umfa.stats().cpu_calls
    ours, _ = example.train("umfa", recipe)
    # A forward and a backward pass for each layer and step.
    assert umfa.stats().cpu_calls - before >= recipe.steps * recipe.layers
    middle = umfa.stats().cpu_calls
    theirs, _ = example.train("jax.nn", recipe)
    assert umfa.stats().cpu_calls == middle
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.2


def test_the_command(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--steps", "2", "--seqlen", "32", "--layers", "1"])
    printed = capsys.readouterr().out
    assert re.search(r"umfa +loss \d\.\d+ -> \d\.\d+, \d+\.\d ms a step", printed)
    assert re.search(r"losses differ by \d\.\de[-+]\d+; umfa computed [2-9]\d* calls", printed)
