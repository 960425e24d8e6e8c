"""A small Whisper with umfa's attention and with stock attention.

    python examples/whisper.py                  # 30 seconds of sound
    python examples/whisper.py --seconds 4 --layers 1

The model is transformers' WhisperForConditionalGeneration with random weights, and with the head
count and width of Whisper tiny (6 × 64). Its encoder looks at all of the sound (50 rows for each
second), and its decoder at the tokens so far and, by cross-attention, at the sound.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from comparison import OURS, compare, finish, positive
from transformers import WhisperConfig, WhisperForConditionalGeneration

import umfa.transformers

TOLERANCE = 1e-4
ROWS = 50  # of the encoder, in a second
VOCABULARY = 1000


def model_of(layers: int, seconds: int) -> Any:
    """Whisper tiny with another vocabulary and depth, for sound of one length."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        encoder_layers=layers,
        decoder_layers=layers,
        max_source_positions=ROWS * seconds,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).eval()


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A small Whisper with umfa and without.")
    parser.add_argument("--seconds", type=positive, default=30, help="of sound")
    parser.add_argument("--tokens", type=positive, default=64, help="that the decoder reads")
    parser.add_argument("--layers", type=positive, default=4, help="of encoder and decoder")
    parser.add_argument("--rounds", type=positive, default=3)
    given = parser.parse_args(arguments)

    model = model_of(given.layers, given.seconds)
    inputs = {
        "input_features": torch.randn(1, model.config.num_mel_bins, 2 * ROWS * given.seconds),
        "decoder_input_ids": torch.randint(4, VOCABULARY, (1, given.tokens)),
    }
    umfa.transformers.register()

    def use(attention: str) -> None:
        model.set_attn_implementation("umfa" if attention == OURS else "sdpa")

    def run() -> Any:
        with torch.inference_mode():
            return model(**inputs, use_cache=False).logits

    compare(f"{given.seconds} s", use, run, rounds=given.rounds, tolerance=TOLERANCE)
    finish()


if __name__ == "__main__":
    main()
