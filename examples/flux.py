"""FLUX's transformer with umfa's attention and with stock attention.

    python examples/flux.py                     # 256², 512² and 1024² pixels
    python examples/flux.py --sizes 1024 --single 4

The model is diffusers' FluxTransformer2DModel in bfloat16 with random weights, and with the head
count (24 × 128), the lengths (a token for each 16 × 16 pixels, and 512 of text) and the width of
FLUX.1. It has fewer blocks: FLUX.1 has 19 double and 38 single ones, 24 GB of weights. One of each
has 1 GB, and takes seconds at 256² and minutes at 1024² on 2 cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from comparison import OURS, compare, finish, positive
from diffusers import FluxTransformer2DModel

import umfa.diffusers

HEAD_DIM = 128
# Two results in bfloat16 (8 bits), rounded at different places, of a few blocks.
TOLERANCE = 1e-2


def model_of(heads: int, double: int, single: int) -> Any:
    """FLUX.1 with fewer blocks, and with `heads` heads of 128."""
    torch.manual_seed(0)
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # the weights never exist in float32
    try:
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            guidance_embeds=True,
        )
    finally:
        torch.set_default_dtype(earlier)
    # With torch's own random weights, gates close the attention and its rows are nearly equal. A
    # comparison would then see little of it.
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" in name and name.endswith("linear.bias"):  # shifts, scales and gates
                weights.normal_()
            elif name.endswith((".norm_q.weight", ".norm_k.weight")):
                weights.fill_(2)  # scores are then 4 times as large
    return model.eval()


def inputs_of(model: Any, size: int, text: int) -> dict[str, Any]:
    """What a pipeline gives the model for one picture of `size` × `size` pixels."""
    side = size // 16
    generator = torch.Generator().manual_seed(size)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).bfloat16()

    positions = torch.zeros(side, side, 3)
    positions[..., 1] += torch.arange(side)[:, None]
    positions[..., 2] += torch.arange(side)
    return {
        "hidden_states": draw(1, side * side, model.config.in_channels),
        "encoder_hidden_states": draw(1, text, model.config.joint_attention_dim),
        "pooled_projections": draw(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], dtype=torch.bfloat16),
        "img_ids": positions.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="FLUX's transformer with umfa and without.")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--text", type=positive, default=512, help="tokens of text")
    parser.add_argument("--heads", type=positive, default=24, help="of 128 channels each")
    parser.add_argument("--double", type=positive, default=1, help="blocks of FLUX.1's 19")
    parser.add_argument("--single", type=positive, default=1, help="blocks of FLUX.1's 38")
    parser.add_argument("--fused-rope", action="store_true", help="umfa's kernel rotates, too")
    parser.add_argument("--rounds", type=positive, default=2)
    given = parser.parse_args(arguments)
    if min(given.sizes) < 16:
        parser.error(f"--sizes: a token has 16 pixels; got {min(given.sizes)}")

    model = model_of(given.heads, given.double, given.single)

    def use(attention: str) -> None:
        if attention == OURS:
            umfa.diffusers.enable(model, fused_rope=given.fused_rope)
        else:
            umfa.diffusers.disable(model)

    print(umfa.diffusers.enable(model, fused_rope=given.fused_rope))
    for size in given.sizes:
        inputs = inputs_of(model, size, given.text)

        def run(inputs: dict[str, Any] = inputs) -> Any:
            with torch.inference_mode():
                return model(**inputs, return_dict=False)[0]

        compare(f"{size}²", use, run, rounds=given.rounds, tolerance=TOLERANCE)
    finish()


if __name__ == "__main__":
    main()
