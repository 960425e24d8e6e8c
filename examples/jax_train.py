"""Train a small character model in JAX with umfa's attention and with jax.nn's.

    python examples/jax_train.py                # 100 steps of 4 x 256 characters
    python examples/jax_train.py --steps 20 --seqlen 1024 --window 128

Both runs start from the same weights and read the same text, so that only the attention differs:
the losses agree within rounding. A step is one jitted function. umfa is a custom call inside of it,
which XLA runs on the CPU.

The text is the reference of the Python language, which every Python carries.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import umfa
from umfa.jax import dot_product_attention

HEADS, HEAD_DIM = 4, 32
WIDTH = HEADS * HEAD_DIM
CHARACTERS = 128  # of ASCII

Weights = dict[str, Any]
ATTENTIONS: dict[str, Callable[..., Any]] = {
    "umfa": dot_product_attention,
    "jax.nn": jax.nn.dot_product_attention,
}


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    steps: int = 100
    batch: int = 4
    seqlen: int = 256
    window: int | None = None
    layers: int = 2
    rate: float = 0.1


def weights_of(recipe: Recipe) -> Weights:
    """Random ones, by name; the same ones in every run."""
    shapes = {"embedding": (CHARACTERS, WIDTH), "positions": (recipe.seqlen, WIDTH)}
    for i in range(recipe.layers):
        shapes |= {f"qkv{i}": (WIDTH, 3 * WIDTH), f"out{i}": (WIDTH, WIDTH)}
        shapes |= {f"up{i}": (WIDTH, 4 * WIDTH), f"down{i}": (4 * WIDTH, WIDTH)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) * (0.02 if name == "embedding" else shape[0] ** -0.5)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def normalised(x: Any) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def loss_of(weights: Weights, text: Any, *, attention: Callable[..., Any], recipe: Recipe) -> Any:
    """Mean cross entropy of each next character. `text`: int32, (batch, seqlen + 1)."""
    x = weights["embedding"][text[:, :-1]] + weights["positions"]
    window = None if recipe.window is None else (recipe.window, 0)
    for i in range(recipe.layers):
        qkv = (normalised(x) @ weights[f"qkv{i}"]).reshape(*x.shape[:2], 3, HEADS, HEAD_DIM)
        q, k, v = (qkv[:, :, j] for j in range(3))
        attended = attention(q, k, v, is_causal=True, local_window_size=window)
        x = x + attended.reshape(x.shape) @ weights[f"out{i}"]
        x = x + jax.nn.gelu(normalised(x) @ weights[f"up{i}"]) @ weights[f"down{i}"]
    logits = normalised(x) @ weights["embedding"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], -1)
    return -chosen.mean()


def batches(recipe: Recipe) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(steps, batch, seqlen + 1): pieces of the text, the same in every run."""
    text = "".join(topics.values()).encode("ascii", "replace")
    characters = np.frombuffer(text, np.uint8).astype(np.int32)
    first = np.random.default_rng(0).integers(
        0, len(characters) - recipe.seqlen - 1, (recipe.steps, recipe.batch, 1)
    )
    return characters[first + np.arange(recipe.seqlen + 1)]


def train(name: str, recipe: Recipe) -> tuple[list[float], list[float]]:
    """(loss, seconds) of each step with one of `ATTENTIONS`."""
    loss = partial(loss_of, attention=ATTENTIONS[name], recipe=recipe)

    @jax.jit
    def step(weights: Weights, text: Any) -> tuple[Weights, Any]:
        value, gradients = jax.value_and_grad(loss)(weights, text)
        update = jax.tree.map(lambda w, g: w - recipe.rate * g, weights, gradients)
        return update, value

    weights, losses, seconds = weights_of(recipe), [], []
    for text in track(batches(recipe), f"{name:8}"):
        start = time.perf_counter()
        weights, value = step(weights, text)
        losses.append(float(value))
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train in JAX with umfa and with jax.nn.")
    default = Recipe()
    for name in ("steps", "batch", "seqlen", "layers", "window"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    recipe = Recipe(**vars(parser.parse_args(arguments)))
    before = umfa.stats().cpu_calls
    found = {name: train(name, recipe) for name in ATTENTIONS}
    for name, (losses, seconds) in found.items():
        # The first step compiles.
        median = 1000 * float(np.median(seconds[1:] or seconds))
        print(f"{name:8} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {median:.1f} ms a step")
    apart = max(abs(a - b) for a, b in zip(*(losses for losses, _ in found.values()), strict=True))
    print(f"losses differ by {apart:.1e}; umfa computed {umfa.stats().cpu_calls - before} calls")


if __name__ == "__main__":
    main()
