"""A block of a real model with stock attention and with umfa's, and the attention alone."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

import umfa

from .cases import TORCH_ATTENTION, UMFA_ATTENTION, Case
from .measure import (
    TOLERANCE,
    Settings,
    Step,
    Turn,
    blank,
    counted,
    judge,
    reference_error,
    row_difference,
    sample,
)
from .peers import Float64, Inputs, Team, make_inputs
from .results import MEASURED, NOT_SUPPORTED, CaseResult, Entry

TEXT_SHARE = 9  # of 4608 tokens, 512 are text


class FluxBlock:
    """diffusers' FluxTransformerBlock with random weights, and calls of it."""

    def __init__(self, case: Case, inputs: Inputs, seed: int) -> None:
        import torch
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.transformers import transformer_flux

        import umfa.diffusers

        self.torch, self.adapter = torch, umfa.diffusers
        dtype, width = getattr(torch, case.dtype), case.heads * case.head_dim
        earlier = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the weights never exist in float32
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.block: Any = transformer_flux.FluxTransformerBlock(
                    dim=width, num_attention_heads=case.heads, attention_head_dim=case.head_dim
                ).eval()
        finally:
            torch.set_default_dtype(earlier)
        generator = torch.Generator().manual_seed(seed)
        text = case.seqlen_q // TEXT_SHARE

        def draw(*shape: int) -> Any:
            return torch.randn(shape, generator=generator).to(dtype)

        angles = torch.rand(case.seqlen_q, case.head_dim // 2, generator=generator)
        angles = angles.repeat_interleave(2, dim=1)
        self.inputs = {
            "hidden_states": draw(1, case.seqlen_q - text, width),
            "encoder_hidden_states": draw(1, text, width),
            "temb": draw(1, width),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }
        self.tensors: list[Any] = [
            torch.from_numpy(array).to(dtype) for array in (inputs.query, inputs.key, inputs.value)
        ]
        self.dispatch: Any = dispatch_attention_fn

    def use(self, ours: bool) -> None:
        """Switch the block, and what `attend` calls."""
        if ours:
            self.adapter.enable(self.block)
        else:
            self.adapter.disable(self.block)

    def run(self) -> Any:
        """The block: rows of text, then of the picture."""
        with self.torch.inference_mode():
            return self.torch.cat(self.block(**self.inputs), dim=1)

    def attend(self) -> Any:
        """The attention alone, of N(0,1), as the block's processor calls it."""
        with self.torch.inference_mode():
            backend = self.block.attn.processor._attention_backend
            return self.dispatch(*self.tensors, backend=backend)


def run_block(case: Case, team: Team, settings: Settings, step: Step) -> CaseResult:
    """Measure the block and its attention, with torch and with umfa, by turns."""
    result = blank(case)
    reason = _missing(team)
    if reason:
        result.umfa.status, result.umfa.reason = NOT_SUPPORTED, reason
        return result
    step("weights")
    inputs = make_inputs(case, settings.seed)
    flux = FluxBlock(case, inputs, settings.seed)
    try:
        _measure(case, result, flux, inputs, settings, step)
    finally:
        flux.use(False)
        umfa.torch.uninstall()
    judge(case, result, settings)
    return result


def _missing(team: Team) -> str:
    """Why the block cannot be run here; empty if it can."""
    if "torch" not in [peer.name for peer in team.peers]:
        return f"needs torch: {team.skipped.get('torch', '--against torch')}"
    try:
        import diffusers  # noqa: F401
    except ModuleNotFoundError as error:
        return f"needs diffusers: not installed ({error})"
    return ""


def _measure(
    case: Case,
    result: CaseResult,
    flux: FluxBlock,
    inputs: Inputs,
    settings: Settings,
    step: Step,
) -> None:
    peer, stock, ours = Entry("torch"), Entry(TORCH_ATTENTION), Entry(UMFA_ATTENTION)
    result.peers = [peer, stock, ours]
    turns = [
        (True, Turn(result.umfa, flux.run)),
        (False, Turn(peer, flux.run)),
        (True, Turn(ours, flux.attend)),
        (False, Turn(stock, flux.attend)),
    ]
    found: list[Float64] = []
    for by_umfa, turn in turns:
        step(f"{turn.entry.name} warms up")
        flux.use(by_umfa)
        counted(turn, settings.sample_s, by_umfa=by_umfa)
        found.append(turn.out.float().numpy().astype(np.float64))
        turn.out = None
        turn.entry.status = MEASURED
    block, stock_block, attention, stock_attention = found
    result.error = reference_error(case, inputs, attention)
    result.correct = result.error <= TOLERANCE[case.dtype]
    for entry, difference in (
        (peer, row_difference(block, stock_block)),
        (stock, row_difference(attention, stock_attention)),
    ):
        entry.difference = difference
        entry.agrees = difference <= TOLERANCE[case.dtype]

    for number in range(settings.repeats):
        step(f"{number + 1} of {settings.repeats}")
        first = number % len(turns)
        for by_umfa, turn in turns[first:] + turns[:first]:
            flux.use(by_umfa)
            sample(turn)

    medians = []
    for _, turn in turns:
        turn.entry.samples_s = turn.samples
        medians.append(statistics.median(turn.samples))
        turn.entry.median_s = medians[-1]
    peer.ratio = medians[1] / medians[0]
    stock.ratio = medians[3] / medians[2]
    result.attention_share = medians[3] / medians[1]
    result.attainable = 1 / (1 - result.attention_share * (1 - 1 / stock.ratio))
