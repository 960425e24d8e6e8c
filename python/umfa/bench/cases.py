"""What is measured: shapes, options, and the speed that each is meant to reach."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Any, Literal

from .._errors import message

Dtype = Literal["float32", "float16", "bfloat16"]
Kind = Literal["compute", "decode", "self", "overhead", "block", "call", "quant"]
Library = Literal["", "numpy", "torch", "torch enabled", "jax", "mlx"]
Mask = Literal["", "boolean mask", "float mask", "float mask with gradient"]

# Lengths under --quick, which only shows that everything works.
QUICK_QUERIES = 64
QUICK_KEYS = 128

ITEMSIZE: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Format:
    """How keys and values are quantised, as `umfa.quantize` takes it."""

    dtype: str
    granularity: str
    block: tuple[int, int] | None = None
    scale_dtype: str = "float16"

    @property
    def title(self) -> str:
        """The format in a few words."""
        block = "" if self.block is None else " {}×{}".format(*self.block)
        return f"{self.dtype} by {self.granularity}{block}"


@dataclass(frozen=True)
class Target:
    """What a case is meant to reach; None where nothing was promised."""

    ratio: float | None = None
    """Times as fast as `against`, at least."""
    share: float | None = None
    """Share of the peak, or of the read bandwidth, at least."""
    microseconds: float | None = None
    """Python's part of a call, at most."""
    against: str = "torch"
    total_us: float | None = None
    """Microseconds of a call, at most."""
    amdahl: bool = False
    """The block is as much faster as its attention allows; see `results.CaseResult.attainable`."""

    def text(self, kind: Kind) -> str:
        """The target in a few characters."""
        parts = []
        if self.ratio is not None:
            parts.append(f"≥ {self.ratio:g}×")
        if self.share is not None:
            of = "bandwidth" if kind == "decode" else "peak"
            parts.append(f"≥ {self.share:.0%} of {of}")
        if self.microseconds is not None:
            over = f" over {self.against}" if kind == "call" else ""
            parts.append(f"≤ {self.microseconds:g} µs{over}")
        if self.total_us is not None:
            parts.append(f"≤ {self.total_us:g} µs a call")
        if self.amdahl:
            parts.append("block: Amdahl's share")
        return ", ".join(parts)


@dataclass(frozen=True)
class Case:
    """One row: attention of one shape, with the options of `umfa.flash_attn_func`.

    ``kind`` is ``"compute"`` (counted in operations), ``"decode"`` (counted in bytes of key and
    value), ``"self"`` (umfa against umfa without window and options), ``"overhead"`` (what
    Python adds to a call), ``"block"`` (a block of a transformer, and its attention alone),
    ``"call"`` (a tiny call beside the same of a library) or ``"quant"`` (quantised keys and values,
    or a `mode` of `umfa.quantized_attention`, against umfa with neither).
    """

    name: str
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: Dtype = "float32"
    heads_kv: int = 0  # 0: as many as heads
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    batch_invariant: bool = False
    backward: bool = False  # also the gradients of query, key and value
    mask: Mask = ""  # (seqlen_q, seqlen_k), of the case's dtype unless boolean
    dropout_p: float = 0.0
    head_dim_v: int = 0  # 0: as head_dim
    kind: Kind = "compute"
    library: Library = ""  # whose arrays a tiny call gets
    quantised: Format | None = None  # of key and value
    mode: str = ""  # of umfa.quantized_attention
    outliers: bool = False  # every 16th channel of the keys has an offset of 5
    target: Target | None = None
    long: bool = False  # only with --long, or by name
    note: str = ""

    @property
    def kv_heads(self) -> int:
        """Heads of key and value."""
        return self.heads_kv or self.heads

    @property
    def value_dim(self) -> int:
        """Head dim of value."""
        return self.head_dim_v or self.head_dim

    @property
    def suite(self) -> str:
        """The suite that has this case."""
        if self.kind == "block" or self.library:
            return "models"
        if self.kind == "quant":
            return "quant"
        return "backward" if self.backward else "cpu"

    @property
    def title(self) -> str:
        """The case in words."""
        heads = f"{self.heads}"
        if self.kv_heads != self.heads:
            heads += f"/{self.kv_heads}"
        lengths = f"{self.seqlen_q}"
        if self.seqlen_k != self.seqlen_q:
            lengths += f"×{self.seqlen_k}"
        mask = "causal" if self.causal else "full"
        if self.window != (-1, -1):
            mask = "causal window" if self.causal else "window"
            mask += " " + "+".join(f"{side}" for side in self.window if side > 0)
        dims = f"{self.head_dim}"
        if self.value_dim != self.head_dim:
            dims += f"/{self.value_dim}"
        text = f"{self.dtype} {mask} ({self.batch}, {heads}, {lengths}, {dims})"
        text += f", {self.quantised.title}" if self.quantised else ""
        text += f", mode {self.mode}" if self.mode else ""
        text += ", outliers" if self.outliers else ""
        text += f", {self.mask}" if self.mask else ""
        text += f", dropout {self.dropout_p:g}" if self.dropout_p else ""
        text += ", forward and backward" if self.backward else ""
        return f"{text}, {self.note}" if self.note else text

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that count: half of them all for causal."""
        if self.window == (-1, -1):
            pairs = self.seqlen_q * self.seqlen_k
            return pairs // 2 if self.causal else pairs
        left, right = self.window
        shift = self.seqlen_k - self.seqlen_q
        pairs = 0
        for query in range(self.seqlen_q):
            first = 0 if left < 0 else max(0, query + shift - left)
            last = self.seqlen_k - 1
            if right >= 0 or self.causal:
                last = min(last, query + shift + (0 if self.causal else right))
            pairs += max(0, last - first + 1)
        return pairs

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products.

        The forward pass has one product of each head dim. The backward pass has three of
        `head_dim` (scores, dQ, dK) and two of `value_dim` (dP, dV).
        """
        dims = self.head_dim + self.value_dim
        if self.backward:
            dims += 3 * self.head_dim + 2 * self.value_dim
        return 2 * self.batch * self.heads * self.visible_pairs * dims

    @property
    def bytes_read(self) -> int:
        """Bytes of key and value, each once."""
        rows = self.batch * self.kv_heads * self.seqlen_k
        return rows * (self.head_dim + self.value_dim) * ITEMSIZE[self.dtype]

    @property
    def command(self) -> str:
        """What makes this row."""
        beside = self.kind in ("compute", "decode") or self.mode
        against = "--against torch " if beside else ""
        suite = "" if self.suite == "cpu" else f"--suite {self.suite} "
        return f"python -m umfa bench {suite}{against}--case {self.name}"

    def quick(self) -> Case:
        """The same with lengths that take no time."""
        return replace(
            self,
            heads=min(self.heads, 4),
            heads_kv=min(self.heads_kv, 2),
            seqlen_q=min(self.seqlen_q, QUICK_QUERIES),
            seqlen_k=min(
                self.seqlen_k, QUICK_KEYS if self.kind in ("decode", "quant") else QUICK_QUERIES
            ),
            window=(min(self.window[0], QUICK_QUERIES // 4), self.window[1]),
        )

    def plain(self) -> Case:
        """Attention over all keys, without options."""
        return replace(self, causal=False, window=(-1, -1), batch_invariant=False)


INVARIANT: tuple[tuple[str, Dtype], ...] = (("fp32", "float32"), ("bf16", "bfloat16"))

CPU: tuple[Case, ...] = (
    Case("fp32-full-1536", 1, 24, 1536, 1536, 128, target=Target(1.35, 0.80)),
    Case("fp32-full-2048", 1, 24, 2048, 2048, 128, target=Target(1.35, 0.80)),
    Case("fp32-full-4608", 1, 24, 4608, 4608, 128, target=Target(1.35, 0.80), long=True),
    Case("fp32-full-d64", 1, 8, 4096, 4096, 64, target=Target(1.2)),
    Case("fp32-causal-1536", 1, 24, 1536, 1536, 128, causal=True, target=Target(1.6)),
    Case("fp32-causal-512", 8, 12, 512, 512, 64, causal=True, target=Target(2.8)),
    Case("bf16-full-1536", 1, 24, 1536, 1536, 128, "bfloat16", target=Target(2.0, 0.65)),
    Case("bf16-causal-512", 8, 12, 512, 512, 64, "bfloat16", causal=True, target=Target(4.5)),
    Case("fp16-full-1536", 1, 24, 1536, 1536, 128, "float16", target=Target(2.0)),
    Case("fp32-cross-77", 1, 8, 4096, 77, 40, target=Target(1.8)),
    Case(
        "decode-bf16",
        1,
        32,
        1,
        16384,
        128,
        "bfloat16",
        heads_kv=8,
        kind="decode",
        target=Target(20.0, 0.80),
    ),
    Case("decode-fp32", 1, 32, 1, 16384, 128, heads_kv=8, kind="decode"),
    Case(
        "window-512",
        1,
        2,
        16384,
        16384,
        64,
        causal=True,
        window=(512, 0),
        kind="self",
        target=Target(12.0, against="umfa-full"),
        note="against umfa over all keys",
    ),
    *(
        Case(
            f"decode-invariant-{name}-b{batch}",
            batch,
            32,
            1,
            seqlen_k,
            128,
            dtype,
            heads_kv=8,
            batch_invariant=True,
            kind="self",
            long=True,
            note="batch_invariant, against umfa without",
        )
        for name, dtype in INVARIANT
        for batch, seqlen_k in ((1, 16384), (8, 4096))
    ),
    Case(
        "call-overhead",
        1,
        1,
        1,
        8,
        8,
        kind="overhead",
        target=Target(microseconds=5.0, against=""),
        note="numpy, against the kernel alone",
    ),
)


def _training(name: str, target: Target | None, **options: Any) -> Case:
    return Case(name, 1, 8, 2048, 2048, 64, backward=True, target=target, **options)


BACKWARD: tuple[Case, ...] = (
    _training("backward-fp32", Target(1.2, 0.75)),
    _training("backward-fp32-causal", Target(1.4), causal=True),
    _training("backward-fp32-boolean-mask", None, mask="boolean mask"),
    _training("backward-fp32-mask", None, mask="float mask"),
    _training("backward-fp32-mask-gradient", Target(2.0), mask="float mask with gradient"),
    _training("backward-fp32-dropout", Target(3.0), dropout_p=0.1),
    _training("backward-fp32-dv128", Target(1.7), head_dim_v=128),
    _training("backward-bf16", Target(1.7), dtype="bfloat16"),
    _training("backward-bf16-causal", Target(2.0), dtype="bfloat16", causal=True),
)


def _block(name: str, dtype: Dtype, target: Target | None) -> Case:
    """FLUX.1's double block for 1024 × 1024 pixels: 4096 tokens of the picture, 512 of text."""
    return Case(
        name, 1, 24, 4608, 4608, 128, dtype, kind="block", target=target, note="a block of FLUX.1"
    )


def _call(name: str, library: Library, note: str, target: Target, kind: Kind = "call") -> Case:
    return Case(name, 1, 1, 1, 8, 8, kind=kind, library=library, target=target, note=note)


# Names of what is measured beside umfa, where it is not a library's attention.
TORCH_ATTENTION, UMFA_ATTENTION = "torch's attention", "umfa's attention"
IDENTITY = "identity"
DISABLED = "torch, umfa disabled"

MODELS: tuple[Case, ...] = (
    _block("flux-block-bf16", "bfloat16", Target(1.8, against=TORCH_ATTENTION, amdahl=True)),
    _block("flux-block-fp32", "float32", None),
    _call(
        "call-torch",
        "torch",
        "torch, umfa's function beside torch's",
        Target(0.5, total_us=8),
    ),
    _call(
        "call-torch-enabled",
        "torch enabled",
        "torch's function with umfa enabled, without umfa, and with umfa disabled",
        Target(0.5, total_us=8),
    ),
    _call(
        "call-numpy",
        "numpy",
        "numpy, beside the kernel alone",
        Target(against="", total_us=4),
        "overhead",
    ),
    _call(
        "call-jax",
        "jax",
        "jax, jitted, beside a jitted identity",
        Target(microseconds=10, against=IDENTITY),
    ),
    _call("call-mlx", "mlx", "mlx", Target(against="mlx", total_us=10)),
)

# What the rows of the suite "quant" are compared with.
UNQUANTISED = "umfa, not quantised"

_FORMATS: dict[str, Format] = {
    "int8": Format("int8", "row"),
    "int8-block": Format("int8", "block", (1, 32)),
    "int8-tensor": Format("int8", "tensor"),
    "int4": Format("int4", "block", (1, 32)),
    "int4-row": Format("int4", "row"),
    "e4m3": Format("float8_e4m3fn", "row"),
    "e5m2": Format("float8_e5m2", "row"),
    "nf4": Format("nf4", "block", (1, 32)),
    "mxfp8": Format("mxfp8", "block", (1, 32), "float8_e8m0fnu"),
    "mxfp4": Format("mxfp4", "block", (1, 32), "float8_e8m0fnu"),
}
_DECODE_RATIOS = {"int8": 1.6, "int4": 2.5}


def _quant(name: str, form: str, seqlen_q: int, seqlen_k: int, **options: Any) -> Case:
    """Llama 3 8B's heads, bfloat16 queries."""
    ratio = _DECODE_RATIOS.get(form) if seqlen_q == 1 else None
    target = Target(ratio, against=UNQUANTISED) if ratio else None
    return Case(
        f"{name}-{form}", 1, 32, seqlen_q, seqlen_k, 128, "bfloat16", heads_kv=8, kind="quant",
        quantised=_FORMATS[form], target=target, **options,
    )  # fmt: skip


def _flux(mode: str, ratio: float) -> Case:
    """Attention of FLUX.1 for 1024 × 1024 pixels, query and key quantised in the call."""
    return Case(
        f"flux-{mode}", 1, 24, 4608, 4608, 128, "bfloat16", kind="quant", mode=mode,
        target=Target(ratio, against=UNQUANTISED),
    )  # fmt: skip


QUANT: tuple[Case, ...] = (
    *(_quant("decode", form, 1, 16384) for form in _FORMATS),
    *(_quant("prefill", form, 1024, 1024, causal=True) for form in ("int8", "int4", "e4m3")),
    *(
        _quant("outliers", form, 512, 512, outliers=True)
        for form in ("int8", "int8-block", "int8-tensor", "int4", "int4-row")
    ),
    _flux("sage", 1.15),
    _flux("int8", 1.35),
)

BURST = 100
"""Calls of a tiny case that are timed together."""

SUITES: dict[str, tuple[Case, ...]] = {
    "cpu": CPU,
    "backward": BACKWARD,
    "models": MODELS,
    "quant": QUANT,
}


def select(suite: str, patterns: list[str], *, long: bool = False) -> list[Case]:
    """The cases whose names match one of the patterns, or all; long ones on request or by name.

    Raises
    ------
    ValueError
        A pattern matches nothing.
    """
    cases = SUITES[suite]
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in cases], pattern):
            names = ", ".join(case.name for case in cases)
            raise ValueError(
                message("umfa.bench", "no case has this name", repr(pattern), f"one of {names}")
            )
    if not patterns:
        return [case for case in cases if long or not case.long]
    chosen = [
        case
        for case in cases
        if case.name in patterns
        or ((long or not case.long) and any(fnmatch.fnmatch(case.name, p) for p in patterns))
    ]
    if not chosen:
        raise ValueError(
            message("umfa.bench", "only long cases match", repr(patterns), "--long, or whole names")
        )
    return chosen
