"""What a run has found, and its way into JSON and back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .._errors import message

SCHEMA = 1

MEASURED = "measured"
NOT_SUPPORTED = "not supported"
FAILED = "failed"
NOT_MEASURED = "not measured"


@dataclass
class Entry:
    """One contender on one case."""

    name: str
    status: str = NOT_MEASURED
    """``"measured"``, ``"not supported"``, ``"failed"`` or ``"not measured"``."""
    reason: str = ""
    """Why it was not measured."""
    median_s: float | None = None
    samples_s: list[float] = field(default_factory=list)
    """Seconds of a call, one for each alternation."""
    calls: int = 0
    """Calls of which a sample is the mean."""
    rate: float | None = None
    """Operations per second, or bytes per second for decode; see `CaseResult.unit`."""
    ratio: float | None = None
    """This contender's median over umfa's: above 1, umfa is faster."""
    difference: float | None = None
    """Largest relative difference of a row from umfa's result."""
    agrees: bool | None = None
    """Whether that is within the tolerance."""


@dataclass
class CaseResult:
    """One row of the table."""

    name: str
    title: str
    kind: str
    dtype: str
    shape: dict[str, int]
    causal: bool
    window: list[int]
    operations: int
    bytes_read: int
    command: str
    target: dict[str, Any]
    """``text`` as in the table, and the numbers behind it; null where nothing was promised."""
    unit: str
    """What rates count: ``"flop/s"`` or ``"bytes/s"``."""
    umfa: Entry
    peers: list[Entry] = field(default_factory=list)
    limit: str = ""
    """What umfa's rate is a share of."""
    limit_rate: float | None = None
    """Median of `limit_samples`."""
    limit_samples: list[float] = field(default_factory=list)
    """Measurements of it, one for each alternation."""
    share: float | None = None
    overhead_us: float | None = None
    """Microseconds that Python adds to a call."""
    attention_share: float | None = None
    """Of a block: the share of its time that the library's own attention takes."""
    attainable: float | None = None
    """Of a block: how many times as fast its faster attention makes it, by Amdahl's law."""
    bytes_ratio: float | None = None
    """Of quantised keys and values: their bytes over those of the case's dtype."""
    cosine: float | None = None
    """Of the result's angle to that of keys and values which are not quantised, in float32."""
    relative_l1: float | None = None
    """Sum of the differences from that result, over the sum of its magnitudes."""
    error: float | None = None
    """Largest relative error of a row, of some rows compared with float64."""
    tolerance: float | None = None
    correct: bool | None = None
    met: bool | None = None
    """Whether the target is reached; null where there is none, or it was not measured."""

    @property
    def wrong(self) -> list[str]:
        """What disagrees, for a reader; a benchmark of a wrong result is worthless."""
        texts = []
        if self.correct is False:
            texts.append(
                f"{self.name}: umfa differs from float64 by {amount(self.error)} of a row, "
                f"more than {amount(self.tolerance)}"
            )
        texts += [
            f"{self.name}: umfa and {peer.name} differ by {amount(peer.difference)} of a row, "
            f"more than {amount(self.tolerance)}"
            for peer in self.peers
            if peer.agrees is False
        ]
        return texts


@dataclass
class PeerInfo:
    """One contender of a run."""

    name: str
    version: str = ""
    threads: str = ""
    """What is known about its threads, and what could not be controlled."""
    skipped: str = ""
    """Why it took no part."""


@dataclass
class Machine:
    """Where it ran."""

    cpu: str
    cores: int
    system: str
    isa: str
    features: list[str]
    compiler: str


@dataclass
class Run:
    """Everything: what ``--json`` writes and ``--from`` reads."""

    suite: str
    threads: int
    repeats: int
    quick: bool
    seed: int
    machine: Machine
    contenders: list[PeerInfo] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def wrong(self) -> list[str]:
        """What disagrees, in all cases."""
        return [text for case in self.cases for text in case.wrong]


def to_json(run: Run) -> dict[str, Any]:
    """Plain values, in the order of the fields."""
    value: dict[str, Any] = finite(asdict(run))
    return value


def finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has no word for them, and a difference may be one."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def amount(value: float | None) -> str:
    """A difference in words."""
    return "NaN or infinity" if value is None or not math.isfinite(value) else f"{value:.1e}"


def from_json(value: Any) -> Run:
    """The run that `to_json` made it from.

    Raises
    ------
    ValueError
        It is something else, or of another version.
    """
    expected = f"what --json of this version writes (schema {SCHEMA})"
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != SCHEMA:
        raise ValueError(message("umfa.bench", "not a benchmark's JSON", found, expected))
    try:
        cases = [
            CaseResult(
                **{
                    **case,
                    "umfa": Entry(**case["umfa"]),
                    "peers": [Entry(**peer) for peer in case["peers"]],
                }
            )
            for case in value["cases"]
        ]
        return Run(
            **{
                **value,
                "machine": Machine(**value["machine"]),
                "contenders": [PeerInfo(**peer) for peer in value["contenders"]],
                "cases": cases,
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            message("umfa.bench", "not a benchmark's JSON", error, expected)
        ) from error
