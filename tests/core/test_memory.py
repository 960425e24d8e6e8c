"""Nothing of size seqlen_q times seqlen_k is ever allocated."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests import reference
from tests.cases import normal
from tests.checks import BASE, LSE, assert_close
from tests.process_memory import STATUS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunPython

SHAPE = (1, 32768, 1, 64)
LIMIT = 100e6

SCRIPT = """
import sys
import numpy as np
import umfa

def rusage():
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

folder, causal = sys.argv[1], sys.argv[2] == "True"
query, key, value = (np.load(f"{folder}/{i}.npy") for i in range(3))
small = np.ones((1, 8, 1, 8), np.float32)
umfa.flash_attn_func(small, small, small)  # starts the threads

# Not ru_maxrss on Linux: it survives exec, so it would be that of the parent at least.
linux = sys.platform == "linux"
before = status("VmRSS") if linux else rusage()
out, lse, _ = umfa.flash_attn_func(query, key, value, causal=causal, return_attn_probs=True)
grown = (status("VmHWM") if linux else rusage()) - before
np.savez(f"{folder}/result.npz", out=out, lse=lse, grown=grown)
"""


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long_sequence_grows_memory_by_little(
    causal: bool, run_python: RunPython, tmp_path: Path
) -> None:
    """(1, 1, 32768, 32768, 64): the scores alone would take 4.3 GB."""
    arrays = [normal(SHAPE, seed=i) for i in range(3)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    process = run_python(STATUS + SCRIPT, str(tmp_path), str(causal), timeout=600)
    assert process.returncode == 0, process.stderr
    result = np.load(tmp_path / "result.npz")
    outputs = result["out"].nbytes + result["lse"].nbytes
    grown = int(result["grown"])
    assert grown - outputs < LIMIT, f"{(grown - outputs) / 1e6:.0f} MB over inputs and outputs"

    # A few rows against the reference. A causal row i attends to the keys up to i, which is what
    # the last row of a shorter problem does.
    query, key, value = arrays
    for i in (0, 1, 127, 128, 5000, 16385, 32767):
        keys = i + 1 if causal else SHAPE[1]
        out, lse = reference.attention(query[:, i : i + 1], key[:, :keys], value[:, :keys])
        found = result["out"][:, i : i + 1].astype(np.float64)
        assert_close(found, out, BASE["float32"], f"row {i}")
        assert_close(result["lse"][:, :, i].astype(np.float64), lse[:, :, 0], LSE, f"lse of {i}")


MASKED = """
import sys
import numpy as np
import umfa

batch, nheads, seqlen, head_dim = map(int, sys.argv[1].split(","))
kind = sys.argv[2]
query, key, value = np.ones((3, batch, nheads, seqlen, head_dim), np.float16)
mask = np.arange(seqlen) < np.linspace(seqlen // 2, seqlen, batch)[:, None]
mask = mask[:, None, None, :]
if kind == "float32":
    mask = np.where(mask, np.float32(0), np.float32(-np.inf))
if kind == "expanded":
    mask = np.broadcast_to(mask, (batch, 1, seqlen, seqlen))
small = np.ones((1, 1, 8, 8), np.float16)
umfa.scaled_dot_product_attention(small, small, small, small[..., :1, :])  # starts the threads
before = status("VmRSS")
out = umfa.scaled_dot_product_attention(query, key, value, mask)
assert (out == 1).all()
print(status("VmHWM") - before - out.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "kind", [pytest.param("bool", marks=pytest.mark.slow), "float32", "expanded"]
)
def test_a_mask_is_never_expanded(kind: str, run_python: RunPython) -> None:
    """(2, 1, 1, 16384): written out, it would take 0.5 GB, or 2 GB in float32."""
    process = run_python(STATUS + MASKED, "2,1,16384,64", kind, timeout=600)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < LIMIT / 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_the_mask_of_flux(kind: str, run_python: RunPython) -> None:
    """(1, 1, 1, 4608): written out, it would take 21 MB for each of 24 heads, or 85 in float32."""
    process = run_python(STATUS + MASKED, "1,24,4608,128", kind, timeout=600)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 20e6


CALLS = """
import resource
import numpy as np, umfa

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

x = np.ones((1, 256, 8, 64), np.float32)
for _ in range(200):
    umfa.flash_attn_func(x, x, x)
before = resident()
for _ in range(2000):
    umfa.flash_attn_func(x, x[:, ::2], x[:, ::2], causal=True, return_attn_probs=True)
    try:
        umfa.flash_attn_func(x, x[..., :32], x)
    except ValueError:
        pass
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calls_leak_nothing(run_python: RunPython) -> None:
    process = run_python(CALLS)
    assert process.returncode == 0, process.stderr
    # One leaked output per call would be a gigabyte, one leaked message a few hundred kilobytes.
    assert int(process.stdout) < 4e6
