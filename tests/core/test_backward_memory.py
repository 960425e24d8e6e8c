"""The backward pass takes little memory beside its results, whatever the lengths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.process_memory import STATUS

if TYPE_CHECKING:
    from tests.conftest import RunPython

ROOT = Path(__file__).parents[2]

MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import umfa
from tests.cases import normal
from tests.gradients import Forward, wanted_of

def measure(call, dout, given):
    '''Print the peak in the backward pass, and the bytes of its inputs and results.'''
    before = status("VmRSS")
    found = call.backward(dout, wanted=wanted_of(given))
    grown = status("VmHWM") - before
    results = sum(x.nbytes for x in found.values())
    inputs = sum(x.nbytes for x in (*given.values(), call.out, call.lse, dout))
    print(grown + inputs, inputs + results)
"""

SCRIPT = """
dtype, heads_k, threads = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
umfa.set_num_threads(threads)
seqlen, heads, head_dim = 16384, 4, 64
given = {
    "query": normal((1, seqlen, heads, head_dim), dtype, seed=1),
    "key": normal((1, seqlen, heads_k, head_dim), dtype, seed=2),
    "value": normal((1, seqlen, heads_k, head_dim), dtype, seed=3),
    "attn_mask": normal((seqlen,), seed=4),
}
# Few of the pairs, for the test to be quick.
call = Forward(**given, window_size=(200, 0))
dout = normal(call.out.shape, dtype, seed=5)
small = {name: x[:, :64] for name, x in given.items() if x.ndim == 4}
Forward(**small).backward(dout[:, :64])  # starts the threads
measure(call, dout, given)
"""


def assert_little_memory(run_python: RunPython, script: str, *arguments: str) -> None:
    """The peak is less than twice the bytes of inputs and outputs."""
    process = run_python(STATUS + MEASURE + script, str(ROOT), *arguments, timeout=600)
    assert process.returncode == 0, process.stderr
    peak, tensors = map(int, process.stdout.split())
    assert peak < 2 * tensors, f"{peak / 1e6:.0f} MB beside {tensors / 1e6:.0f} MB of tensors"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "heads_k", "threads"), [("float32", 4, 2), ("bfloat16", 1, 2), ("float32", 4, 1)]
)
def test_peak(dtype: str, heads_k: int, threads: int, run_python: RunPython) -> None:
    """At 16384 positions less than twice the bytes of inputs and outputs."""
    assert_little_memory(run_python, SCRIPT, dtype, str(heads_k), str(threads))


FEATURE = """
feature = sys.argv[2]
umfa.set_num_threads(2)
seqlen, heads, head_dim = 16384, 2, 64

def tensors(seqlen):
    '''Arguments of the call, and its options.'''
    heads_k = 1 if feature == "gqa" else heads
    given = {
        name: normal((1, seqlen, heads if name == "query" else heads_k, head_dim), seed=seed)
        for seed, name in enumerate(("query", "key", "value"))
    }
    options = {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window_size": (1000, 500)},
        "gqa": {},
        "alibi": {"alibi_slopes": np.array([0.25, 0.0625], np.float32)},
        "softcap": {"softcap": 20.0},
        "dropout": {"dropout_p": 0.1, "dropout_seed": 7},
        "varlen": {},
    }[feature]
    if "alibi_slopes" in options:
        given |= options
        options = {}
    if feature == "varlen":
        given = {name: x[0] for name, x in given.items()}
        starts = np.array([0, seqlen // 16, seqlen // 4, seqlen], np.int32)
        options = dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
    return given, options

def forward(seqlen):
    given, options = tensors(seqlen)
    call = Forward(**given, **options)
    return call, normal(call.out.shape, seed=5), given

call, dout, _ = forward(256)
call.backward(dout)  # starts the threads
measure(*forward(seqlen))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "feature", ["plain", "causal", "window", "gqa", "alibi", "softcap", "dropout", "varlen"]
)
def test_peak_of_each_feature(feature: str, run_python: RunPython) -> None:
    """The scores alone would take 2.1 GB."""
    assert_little_memory(run_python, FEATURE, feature)
