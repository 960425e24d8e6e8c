"""A small UNet of Stable Diffusion's kind with umfa's attention and with stock attention.

    python examples/unet.py                     # 64 × 64 latents: pictures of 512 × 512 pixels
    python examples/unet.py --side 32 --channels 64

The model is diffusers' UNet2DConditionModel with random weights. Its heads have 40 channels and it
looks at 77 tokens of text, as in Stable Diffusion 1.5, which has 4 levels of up to 1280 channels.
This one has 2 levels. Its processors call PyTorch's attention, which `umfa.diffusers.enable` lets
umfa compute in the whole process.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from comparison import OURS, compare, finish, positive
from diffusers import UNet2DConditionModel

import umfa.diffusers

TOLERANCE = 1e-4
HEAD_DIM, TEXT, TEXT_CHANNELS = 40, 77, 768


def model_of(channels: int) -> Any:
    """Two levels, of `channels` and twice as many; attention of both kinds on each."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(channels, 2 * channels),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_CHANNELS,
        # diffusers calls it so; it is the number of heads.
        attention_head_dim=(channels // HEAD_DIM, 2 * channels // HEAD_DIM),
        norm_num_groups=8,
    ).eval()


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A small UNet with umfa and without.")
    parser.add_argument("--side", type=positive, default=64, help="of the latents")
    parser.add_argument("--channels", type=positive, default=160, help="of the first level")
    parser.add_argument("--rounds", type=positive, default=3)
    given = parser.parse_args(arguments)
    if given.channels % HEAD_DIM or given.side % 2:
        parser.error(f"--channels is a multiple of {HEAD_DIM}, --side of 2")

    model = model_of(given.channels)
    inputs = {
        "sample": torch.randn(1, 4, given.side, given.side),
        "timestep": 1,
        "encoder_hidden_states": torch.randn(1, TEXT, TEXT_CHANNELS),
    }

    def use(attention: str) -> None:
        if attention == OURS:
            umfa.diffusers.enable(model)
        else:
            umfa.diffusers.disable(model)

    def run() -> Any:
        with torch.inference_mode():
            return model(**inputs, return_dict=False)[0]

    print(umfa.diffusers.enable(model))
    what = f"{given.side} x {given.side}"
    compare(what, use, run, rounds=given.rounds, tolerance=TOLERANCE)
    finish()


if __name__ == "__main__":
    main()
