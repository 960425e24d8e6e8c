"""Stage: the machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

from tests.on_a_mac.metal import Device, MetalError
from tests.on_a_mac.part import Part


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not there"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip() or f"status {done.returncode}"


def run(part: Part, *, quick: bool) -> None:
    part.write(
        f"* {platform.platform()}",
        f"* Metal compiler: {output_of('xcrun', 'metal', '--version').splitlines()[0]}",
    )
    with part.guarded("The GPU, without umfa"):
        try:
            with Device() as device:
                part.write(f"* GPU: {device.name}, families Apple {device.families()}")
        except MetalError as error:
            part.fail("No GPU", str(error))
    environment = output_of(sys.executable, "-m", "umfa", "env", "--json")
    part.write("", "```json", environment, "```")
    if not quick:
        part.write("", "```text", output_of(sys.executable, "-m", "pip", "list"), "```")
