"""The problems that a bundle holds: which are checked, which are timed.

Only the standard library: this module is read both where bundles are built and where they run.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One attention problem, and the GPU that the planner is to plan for."""

    batch: int = 1
    heads: int = 2
    heads_k: int = 0  # 0: as heads
    seqlen_q: int = 128
    seqlen_k: int = 0  # 0: as seqlen_q
    head_dim: int = 64
    head_dim_v: int = 0  # 0: as head_dim
    dtype: str = "float16"
    key_dtype: str = ""  # "": dtype; also for value and out
    value_dtype: str = ""
    out_dtype: str = ""
    # Quantised keys and values: "int8_row", or "int4_32" with a scale for 32 channels of a token.
    # In layout "bshd", and one sequence for each index of the batch.
    key_codes: str = ""
    value_codes: str = ""
    layout: str = "bshd"  # see placement.py
    causal: str = ""  # "lower_right" or "upper_left"
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float = 0.0  # 0: head_dim ** -0.5
    alibi: bool = False
    mask: str = ""  # its dtype
    mask_varies: tuple[bool, bool, bool, bool] = (True, True, True, True)  # else broadcast
    lse: bool = True
    # Sequences of these lengths, packed; seqlen_q and seqlen_k are the longest, batch their number.
    seqlens_q: tuple[int, ...] = ()
    seqlens_k: tuple[int, ...] = ()
    page_size: int = 0  # > 0: their keys lie in pages
    by_tables: bool = False  # a kernel reads where they lie, in place of the host
    sinks: bool = False
    chunk: int = 0
    qv: bool = False
    dropout: float = 0.0  # with seed and offset 0
    rotary: str = ""  # "pairs" or "halves": queries and keys; with new rows those alone
    # Of the keys these are the last, and go into a cache first; with a page_size into pages.
    new_rows: int = 0
    # > 0: values of the keys from here on are NaN and infinities; no query may see those keys.
    bad_from: int = 0
    # All gradients that the call has instead of the result; of the inputs' dtypes, or float32.
    backward: bool = False
    float32_gradients: bool = False
    dlse: bool = False  # the log-sum-exp has a gradient too
    family: int = 9
    cores: int = 40  # 1: gets the tiles of large problems
    label: str = ""
    compared_with: str = ""  # of a timed case: label of the one that its ratio is to

    def __post_init__(self) -> None:
        if self.seqlens_q:
            object.__setattr__(self, "batch", len(self.seqlens_q))
            object.__setattr__(self, "seqlen_q", max(self.seqlens_q))
            object.__setattr__(self, "seqlen_k", max(self.seqlens_k))
        for name, other in (
            ("heads_k", self.heads),
            ("seqlen_k", self.seqlen_q),
            ("head_dim_v", self.head_dim),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, other)

    @property
    def name(self) -> str:
        """What distinguishes it: shape first, then every field that is not the default."""
        shape = (
            f"b{self.batch}h{self.heads}q{self.seqlen_q}k{self.seqlen_k}d{self.head_dim}"
            f"-{self.dtype}-apple{self.family}"
        )
        skipped = {"batch", "heads", "seqlen_q", "seqlen_k", "head_dim", "dtype", "family", "cores"}
        defaults = Case(
            heads=self.heads, seqlen_q=self.seqlen_q, head_dim=self.head_dim, batch=self.batch
        )
        parts = [self.label] if self.label else []
        parts.append(shape)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in {*skipped, "label", "compared_with"} or value == getattr(defaults, f.name):
                continue
            if isinstance(value, tuple):
                value = "_".join(str(int(x)) for x in value)
            parts.append(f.name if value is True else f"{f.name}_{value}")
        return "-".join(parts)

    def dtype_of(self, tensor: str) -> str:
        """The dtype of "key", "value" or "out"; `dtype` for other tensors."""
        own: str = getattr(self, f"{tensor}_dtype", "")
        return own or self.dtype

    @property
    def small(self) -> bool:
        """Whether the sanitizers, which slow a kernel down hundredfold, may have it."""
        return max(self.seqlen_q, self.seqlen_k) <= 320 and self.batch * self.heads <= 8

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(plain: dict[str, Any]) -> Case:
        """The case that `plain` wrote, perhaps by way of JSON."""
        return Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})


HEAD_DIMS = (32, 40, 64, 72, 80, 96, 128, 160, 192, 256, 320, 512)


def _checks() -> list[Case]:
    found = []
    for head_dim in HEAD_DIMS:
        for dtype in ("float16", "bfloat16", "float32"):
            base = Case(seqlen_q=100, seqlen_k=133, head_dim=head_dim, dtype=dtype, cores=1)
            found.append(base)
            # Where the tile tables differ: bfloat fragments and larger tiles from Apple9 on.
            if head_dim in (64, 128, 256):
                found.append(replace(base, family=7, causal="lower_right"))
    for dtype in ("float16", "float32"):
        base = Case(seqlen_q=130, seqlen_k=200, heads=4, heads_k=2, dtype=dtype, cores=1)
        found += [
            replace(base, cores=40),
            replace(base, causal="lower_right"),
            replace(base, causal="upper_left"),
            replace(
                base, seqlen_q=200, seqlen_k=130, causal="lower_right"
            ),  # rows that see nothing
            replace(base, window=(40, 10)),
            replace(base, window=(16, 0), causal="lower_right", batch=2),
            replace(base, softcap=15.0, causal="lower_right"),
            replace(base, alibi=True, causal="lower_right"),
            replace(base, scale=-0.3),
            replace(base, head_dim=96, head_dim_v=40),
            replace(base, head_dim=40, head_dim_v=128),
            replace(base, layout="bhsd", batch=2),
            replace(base, layout="packed"),
            replace(base, layout="odd"),
            replace(base, layout="channels"),
            replace(base, mask="bool"),
            replace(base, mask="bool", mask_varies=(False, False, False, True)),
            replace(base, mask=dtype, causal="lower_right"),
            replace(base, mask="float32", mask_varies=(False, True, True, True), softcap=9.0),
        ]
    # Every pair of dtypes for every pair of tensors.
    dtypes = ("float32", "float16", "bfloat16")
    for i, j in itertools.product(range(3), repeat=2):
        tiles = Case(
            seqlen_q=100, seqlen_k=133, heads=4, heads_k=2, head_dim=80, dtype=dtypes[i],
            key_dtype=dtypes[j], value_dtype=dtypes[(-i - j) % 3], out_dtype=dtypes[(j + 1) % 3],
        )  # fmt: skip
        found += [
            tiles,
            replace(tiles, seqlen_q=2, seqlen_k=900, cores=132, layout=("bshd", "odd", "bhsd")[i]),
        ]
    # Few queries, many keys: the decode kernel, its splits and their merge.
    for dtype in ("float16", "bfloat16", "float32"):
        for head_dim in (64, 128, 256):
            base = Case(
                heads=8, heads_k=2, seqlen_q=1, seqlen_k=300, head_dim=head_dim, dtype=dtype
            )
            found.append(base)
            found.append(replace(base, seqlen_k=3000, batch=2, cores=132))
    decode = Case(heads=8, heads_k=2, seqlen_q=1, seqlen_k=300, cores=132)
    found += [
        replace(decode, seqlen_q=4, causal="lower_right"),
        replace(decode, head_dim=512),
        replace(decode, head_dim=512, seqlen_k=3000),
        replace(decode, heads_k=1, head_dim=576, head_dim_v=512, seqlen_q=3, seqlen_k=1500),
        replace(decode, heads_k=1, head_dim_v=512, qv=True, sinks=True, causal="lower_right"),
        replace(decode, qv=True, seqlen_k=3000, batch=2),
        replace(decode, heads_k=8, seqlen_k=3000, alibi=True, sinks=True),
        replace(decode, heads_k=8, head_dim=128, window=(100, 0), layout="odd"),
        replace(decode, head_dim=80, head_dim_v=48),
        replace(decode, window=(100, 0), causal="lower_right"),
        replace(decode, alibi=True),
        replace(decode, softcap=20.0),
        replace(decode, mask="bool", mask_varies=(True, False, False, True)),
        replace(decode, layout="bhsd", batch=1),
        replace(decode, layout="odd"),
        replace(decode, family=7, dtype="bfloat16"),
        replace(decode, seqlen_k=20000, causal="lower_right"),
    ]
    # Sequences: tiles, decode with and without splits; packed, in pages.
    for dtype in ("float16", "bfloat16", "float32"):
        tiles = Case(
            heads=2, heads_k=1, seqlens_q=(40, 0, 70, 1), seqlens_k=(65, 9, 50, 130), dtype=dtype
        )
        few = replace(tiles, heads=4, heads_k=2, seqlens_q=(1, 0), seqlens_k=(300, 9), cores=132)
        for base in (tiles, few):
            found += [
                base,
                replace(base, causal="lower_right", alibi=True),
                replace(base, head_dim=72, head_dim_v=40, layout="odd", page_size=5),
                replace(base, page_size=1),
                replace(base, page_size=16, causal="lower_right", lse=False),
                replace(base, page_size=48, head_dim=128, sinks=True, chunk=30),
                replace(base, window=(30, 4), softcap=8.0, sinks=True),
            ]
        ragged = replace(few, seqlens_q=(1, 2, 5), seqlens_k=(20000, 300, 5000), page_size=64)
        found += [ragged, replace(ragged, by_tables=True)]
        for base in (tiles, few):
            found += [
                replace(base, by_tables=True, causal="lower_right"),
                replace(base, by_tables=True, page_size=5, window=(30, 4)),
            ]
    found += [
        Case(heads=4, seqlen_q=100, sinks=True, causal="lower_right"),
        Case(heads=4, seqlen_q=100, chunk=37),
        replace(decode, sinks=True, seqlen_k=3000),
        replace(decode, seqlen_q=5, chunk=40, causal="lower_right"),
    ]
    # Rotated, appended, dropped, and with a second part of the queries.
    for dtype in ("float16", "bfloat16", "float32"):
        tiles = Case(heads=4, heads_k=2, batch=2, seqlen_q=70, seqlen_k=130, dtype=dtype)
        few = replace(tiles, seqlen_q=3, seqlen_k=300, cores=132)
        found += [
            replace(tiles, rotary="pairs", causal="lower_right"),
            replace(tiles, rotary="halves", head_dim=72, head_dim_v=72, layout="odd"),
            replace(tiles, rotary="halves", head_dim=192, head_dim_v=128),
            replace(few, rotary="pairs"),
            replace(tiles, qv=True, causal="lower_right"),
            replace(tiles, qv=True, head_dim_v=512, seqlen_q=40),
            replace(tiles, qv=True, head_dim=576, head_dim_v=512, seqlen_q=20),
            replace(tiles, head_dim=576, head_dim_v=512, seqlen_q=20, causal="lower_right"),
        ]
        for base in (tiles, few):
            found += [
                replace(base, dropout=0.3, causal="lower_right"),
                replace(base, dropout=0.5, window=(50, 3), head_dim=128, head_dim_v=128),
                replace(base, dropout=0.1, sinks=True, layout="odd", head_dim=40, head_dim_v=40),
                replace(base, new_rows=20, causal="lower_right"),
                replace(base, new_rows=9, rotary="pairs", causal="lower_right", page_size=7),
                replace(base, new_rows=9, rotary="halves", layout="odd", head_dim=33),
                replace(base, new_rows=9, rotary="pairs", page_size=7, by_tables=True),
            ]
    found += _code_checks()
    # Values that nobody sees, beside some that all see: causal from the top left.
    for dtype in ("float16", "bfloat16", "float32"):
        tiles = Case(
            seqlen_q=40, seqlen_k=90, heads=4, heads_k=2, dtype=dtype, causal="upper_left",
            bad_from=40,
        )  # fmt: skip
        found += [tiles, replace(tiles, head_dim=128), replace(tiles, head_dim=320)]
        found += [replace(tiles, seqlen_q=4, bad_from=4, head_dim=d) for d in (64, 128, 256)]
    found += _backward_checks()
    # Larger ones, many tiles long.
    for dtype in ("float16", "bfloat16", "float32"):
        found += [
            Case(heads=8, seqlen_q=1024, head_dim=128, dtype=dtype, causal="lower_right"),
            Case(heads=8, heads_k=2, seqlen_q=1000, seqlen_k=2049, dtype=dtype, window=(256, 256)),
        ]
    return list(dict.fromkeys(found))


CODES = ("int8_row", "int4_32")


def _code_checks() -> list[Case]:
    """Keys and values that are quantised, by tiles and in decoding."""
    found = []
    for dtype, codes in itertools.product(("float16", "bfloat16", "float32"), CODES):
        base = Case(
            heads=8, heads_k=2, seqlen_q=100, seqlen_k=133, dtype=dtype, causal="lower_right",
            key_codes=codes, value_codes=codes,
        )  # fmt: skip
        found += [replace(base, head_dim=d, head_dim_v=d) for d in (64, 72, 128, 256)]
        few = replace(base, seqlen_q=1, seqlen_k=3000, cores=132)
        found += [replace(few, head_dim=d, head_dim_v=d) for d in (64, 128)]
        found += [
            replace(few, seqlen_q=n, batch=2, heads_k=8, head_dim=128, head_dim_v=128)
            for n in (1, 3)
        ]
    tiles = Case(heads=4, seqlen_q=100, seqlen_k=133, key_codes="int8_32", value_codes="int4_row")
    return [
        *found,
        tiles,
        replace(tiles, key_codes="", rotary="halves"),
        replace(tiles, value_codes="", mask="bool", head_dim=128, head_dim_v=128),
    ]


def _backward_checks() -> list[Case]:
    found = []
    for dtype in ("float16", "bfloat16", "float32"):
        base = Case(
            seqlen_q=100, seqlen_k=133, heads=4, heads_k=2, dtype=dtype, backward=True,
            causal="lower_right",
        )  # fmt: skip
        for head_dim in (32, 64, 80, 96, 128, 160, 192, 256):
            found.append(replace(base, head_dim=head_dim, head_dim_v=head_dim))
            if head_dim in (64, 128, 256):
                found.append(replace(found[-1], family=7, float32_gradients=True))
        found += [
            replace(base, head_dim=192, head_dim_v=128),
            replace(base, head_dim=576, head_dim_v=512),
            replace(base, head_dim=576, head_dim_v=512, family=7, rotary="pairs", dlse=True),
            replace(base, head_dim=320, head_dim_v=320, mask="float32", dropout=0.3),
            replace(base, head_dim=512, head_dim_v=512, qv=True, causal="", window=(40, 10)),
            replace(base, head_dim=64, head_dim_v=512, qv=True, sinks=True),
            replace(base, head_dim=40, head_dim_v=70, layout="odd"),
            replace(base, causal="", layout="bhsd", batch=2),
            replace(base, causal="upper_left", layout="packed", dlse=True),
            replace(base, seqlen_q=200, seqlen_k=130),  # rows that see nothing
            replace(base, causal="", window=(40, 10)),
            replace(base, chunk=37),
            replace(base, softcap=15.0, scale=-0.3),
            replace(base, alibi=True, layout="channels"),
            replace(base, mask="bool"),
            replace(base, mask="float32", mask_varies=(False, True, True, True), softcap=9.0),
            replace(base, mask=dtype, mask_varies=(True, False, True, True), batch=2, causal=""),
            replace(base, mask="float32", mask_varies=(False, False, False, True), head_dim=128,
                    head_dim_v=128, dropout=0.3),
            # The gradients of a row's scores add up to dlse.
            replace(base, mask="float32", mask_varies=(False, True, True, False), causal="",
                    dlse=True),
            replace(base, mask=dtype, mask_varies=(False, True, False, False), head_dim=256,
                    head_dim_v=256, dlse=True),
            replace(base, sinks=True, dlse=True),
            replace(base, sinks=True, alibi=True, dropout=0.3, batch=2, head_dim=128,
                    head_dim_v=128),
            replace(base, qv=True, head_dim_v=128),
            replace(base, qv=True, causal="", window=(40, 10), head_dim=128, softcap=15.0),
            replace(base, rotary="pairs"),
            replace(base, rotary="halves", head_dim=128, head_dim_v=128, causal=""),
            replace(base, rotary="halves", head_dim=160, head_dim_v=160, family=7),
            replace(base, rotary="pairs", qv=True, sinks=True, alibi=True, mask="float32"),
            replace(base, dropout=0.3, batch=2),
            replace(base, seqlens_q=(40, 0, 70, 1), seqlens_k=(65, 9, 50, 130), alibi=True),
            replace(base, seqlens_q=(90, 33), seqlens_k=(50, 130), head_dim=128, head_dim_v=128,
                    dlse=True),
            replace(base, seqlen_q=520, seqlen_k=1030, head_dim=128, head_dim_v=128),
        ]  # fmt: skip
    return found


def _code_timings(plain: list[Case]) -> list[Case]:
    """Prompts, and decoding of one sequence and of several, beside the same with numbers."""
    labels = ("f16-d64", "f16-d128", "f16-d128-causal", "decode-b1", "decode-b8",
              "decode-mha-4k-b4")  # fmt: skip
    return [
        replace(case, key_codes=codes, value_codes=codes, label=f"{case.label}-{codes}",
                compared_with=case.label)
        for case in plain
        if case.label in labels
        for codes in CODES
    ]  # fmt: skip


def _backward_timings(forward: list[Case]) -> list[Case]:
    """Of the plain calls."""
    return [
        replace(
            case, backward=True, lse=True, label=f"{case.label}-backward", compared_with=case.label
        )
        for case in forward
    ]


def _timings() -> list[Case]:
    base = Case(batch=4, heads=16, seqlen_q=4096, lse=False, cores=132)
    long = replace(base, batch=1, heads=16, seqlen_q=16384, seqlen_k=16384, head_dim=128)
    decode = Case(
        heads=32, heads_k=8, seqlen_q=1, seqlen_k=16384, head_dim=128, lse=False, cores=132
    )
    found = []
    for head_dim in (64, 128):
        full = replace(
            base, seqlen_k=4096, head_dim=head_dim, head_dim_v=head_dim, label=f"f16-d{head_dim}"
        )
        found += [
            full,
            replace(
                full,
                causal="lower_right",
                label=f"{full.label}-causal",
                compared_with=full.label,
            ),
        ]
    found += [
        replace(full, dtype=dtype, label=full.label.replace("f16", short))
        for full in (found[0], found[2])
        for dtype, short in (("bfloat16", "bf16"), ("float32", "f32"))
    ]
    plain = list(found)
    found += [
        *(
            replace(found[0], **{field: value}, label=f"f16-d64-{value}", compared_with="f16-d64")
            for field, value in (("dropout", 0.1), ("rotary", "pairs"), ("rotary", "halves"))
        ),
        *(
            replace(
                full,
                mask=dtype,
                mask_varies=(False, False, True, True),
                label=f"{full.label}-mask-{dtype}",
                compared_with=full.label,
            )
            for full in (found[0], found[2])
            for dtype in ("bool", "float16", "bfloat16", "float32")
        ),
        replace(long, head_dim_v=128, label="long"),
        replace(
            long,
            head_dim_v=128,
            window=(511, 0),
            causal="lower_right",
            label="long-window512",
            compared_with="long",
        ),
        replace(
            base,
            seqlen_k=4096,
            head_dim=256,
            head_dim_v=256,
            label="f16-d256",
            compared_with="f16-d128",
        ),
        replace(decode, label="decode-b1"),
        replace(decode, batch=8, label="decode-b8"),
        replace(decode, batch=4, heads_k=32, seqlen_k=4096, label="decode-mha-4k-b4"),
        replace(decode, head_dim=512, head_dim_v=512, label="decode-d512"),
        replace(decode, heads=128, heads_k=1, head_dim=576, head_dim_v=512, label="decode-mla"),
        replace(
            decode, heads=128, heads_k=1, head_dim=64, head_dim_v=512, qv=True, label="decode-qv"
        ),
        *(
            replace(
                decode,
                seqlens_q=(1,) * 8,
                seqlens_k=(16384,) * 8,
                page_size=page_size,
                label=f"decode-b8-pages{page_size}",
                compared_with="decode-b8",
            )
            for page_size in (16, 64, 48)
        ),
        replace(
            base,
            seqlen_k=4096,
            head_dim=128,
            head_dim_v=128,
            seqlens_q=(4096, 1024, 3072, 4096, 4096),
            seqlens_k=(4096, 1024, 3072, 4096, 4096),
            label="varlen-d128",
            compared_with="f16-d128",
        ),
    ]
    return found + _code_timings(found) + _backward_timings(plain)


CHECKS = _checks()
TIMINGS = _timings()
