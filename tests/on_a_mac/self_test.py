"""Stage: umfa's own test of the GPU, with its outcome in full."""

from __future__ import annotations

import umfa
from tests.on_a_mac.part import Part


def run(part: Part, *, quick: bool) -> None:
    tests = umfa.self_test()
    if not tests:
        part.fail("No GPU was tested", str(umfa.backends()))
    for test in tests:
        part.write(
            f"* {test.dtype}: {test.pipelines} pipelines in {test.seconds:.2f} s on {test.device}, "
            f"{test.system}"
        )
        for family, fault in test.faults.items():
            if fault:
                part.fail(f"{family} is excluded", fault)
            else:
                part.write(f"  * {family}: agrees with the CPU")
