"""Runs stages one after another, and puts their parts together after each."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.on_a_mac import stages
from tests.on_a_mac.process import run_limited
from tests.on_a_mac.stages import Stage
from umfa.cli.env import tidy

ROOT = Path(__file__).parents[2]


def anonymous(text: str) -> str:
    """Without the checkout's path, home folders, and temporary folders of this user."""
    for path in {str(ROOT), str(ROOT.resolve())}:
        text = re.sub(rf"{re.escape(path)}(?![\w-])", "umfa", text)
    return re.sub(r"/(private/)?var/folders/[^\s'\"]+?/T/", "/tmp/", tidy(text))


def search_path() -> str:
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, folders))


def self_test_of(stage: Stage) -> str:
    """UMFA_SELF_TEST of a stage: "0" in other stages, so that they run excluded kernels too."""
    return "force" if stage == stages.SELF_TEST else "0"


def run_stage(stage: Stage, folder: Path, *, quick: bool, double: bool) -> tuple[int, str]:
    """The status of a stage, and its part of the report, whatever became of it."""
    part, log = folder / f"{stage.name}.md", folder / f"{stage.name}.log"
    part.unlink(missing_ok=True)
    outcome = run_limited(
        stages.command(stage, part, quick=quick, double=double),
        log,
        stage.seconds,
        {**os.environ, "PYTHONPATH": search_path(), "UMFA_SELF_TEST": self_test_of(stage)},
    )
    text = part.read_text(encoding="utf-8") if part.exists() else ""
    lines = [f"## {stage.title}", "", text.rstrip() or "Nothing was written."]
    if outcome.status not in (stages.GOOD, stages.BAD, stages.WRONG) or (
        outcome.status != stages.GOOD and outcome.tail
    ):
        lines += ["", f"**This stage {outcome.words}.** Its last lines:", ""]
        lines += ["````text", outcome.tail, "````"]
    return outcome.status, "\n".join([*lines, ""])


def write(
    chosen: list[Stage], output: Path, folder: Path, *, quick: bool = False, double: bool = False
) -> dict[str, int]:
    """Run the stages; `output` is whole, as far as it goes, after each. Returns their statuses."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, statuses = [], {}
    for number, stage in enumerate(chosen):
        print(f"{number + 1} of {len(chosen)}: {stage.title} …", flush=True)
        statuses[stage.name], part = run_stage(stage, folder, quick=quick, double=double)
        parts.append(part)
        words = {stages.GOOD: "good", stages.BAD: "**not all good**", stages.WRONG: "**wrong**"}
        head = ["# umfa on a Mac", ""]
        if double:
            head += ["**Not a Mac: run on the double of Metal.**", ""]
        head += ["| stage | |", "|---|---|"]
        head += [
            f"| {s.title} | {words.get(statuses[s.name], '**did not end**')} |"
            if s.name in statuses
            else f"| {s.title} | not yet run |"
            for s in chosen
        ]
        output.write_text(anonymous("\n".join([*head, "", *parts])), encoding="utf-8")
    return statuses
