"""Makes the helpers of the emulator's tests importable here."""

from __future__ import annotations

import sys
from pathlib import Path

_EMULATOR = Path(__file__).parents[1] / "emulator"
if str(_EMULATOR) not in sys.path:
    sys.path.insert(0, str(_EMULATOR))
