"""What a dispatch did, counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counters:
    """Totals over all threads of a dispatch. They do not depend on the schedule.

    ``mma`` counts 8x8x8 products (512 multiply-adds each); barriers count once per threadgroup or
    simdgroup, not per thread; shuffles, reductions and scans once per simdgroup.
    ``flops`` counts scalar floating-point operations outside of ``mma``, a fused one as two.
    Bytes of the ``constant`` address space are apart from device bytes. The bytes per buffer are
    known only when checks are on.
    """

    mma: int = 0
    flops: int = 0
    fma: int = 0
    exp2: int = 0
    exp: int = 0
    shuffles: int = 0
    simd_operations: int = 0
    device_bytes_read: int = 0
    device_bytes_written: int = 0
    constant_bytes_read: int = 0
    threadgroup_bytes_read: int = 0
    threadgroup_bytes_written: int = 0
    threadgroup_barriers: int = 0
    simdgroup_barriers: int = 0
    threadgroups: int = 0
    threadgroup_memory: int = 0
    buffer_bytes_read: dict[int, int] = field(default_factory=dict)
    buffer_bytes_written: dict[int, int] = field(default_factory=dict)
