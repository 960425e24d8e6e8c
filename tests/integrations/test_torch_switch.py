"""Enabling and disabling umfa under torch: threads, processes, graphs, and what stays."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integrations.calls import FUSED, SDPA, Counted, tensors

torch = pytest.importorskip("torch")
F = torch.nn.functional
umfa_torch = pytest.importorskip("umfa.torch")


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    yield
    umfa_torch.disable()
    assert not umfa_torch.is_enabled()


def test_disabling_restores_torch_bit_for_bit() -> None:
    given = tensors(1, 2, 50, 16, grad=True)

    def run() -> list[Any]:
        out = F.scaled_dot_product_attention(*given, is_causal=True)
        return [out, *torch.autograd.grad(out.sum(), given)]

    before = run()
    umfa_torch.enable()
    umfa_torch.enable()
    run()
    umfa_torch.disable()
    counted = Counted()
    after = run()
    assert counted.calls == 0
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


def test_blocks_nest_and_end() -> None:
    umfa_torch.enable()
    with umfa_torch.sdpa(), umfa_torch.sdpa():
        umfa_torch.disable()
        assert umfa_torch.is_enabled(), "inside of a block"
    assert not umfa_torch.is_enabled()
    with pytest.raises(ZeroDivisionError), umfa_torch.sdpa():
        raise ZeroDivisionError
    assert not umfa_torch.is_enabled()
    umfa_torch.enable()
    with umfa_torch.sdpa():
        pass
    assert umfa_torch.is_enabled()


def test_threads_are_counted_too() -> None:
    given = tensors(1, 2, 24, 16)
    counted = Counted()

    def work() -> None:
        for _ in range(20):
            F.scaled_dot_product_attention(*given)

    with umfa_torch.sdpa():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counted.taken == {SDPA: 80}


def test_models_can_be_copied_and_pickled() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    with umfa_torch.sdpa(), torch.no_grad():
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            counted = Counted()
            assert torch.equal(twin(x), expected)
            assert counted.taken == {FUSED: 1}


WORKERS = """
import torch, umfa, umfa.torch

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        q = torch.full((1, 1, 4, 8), float(i))
        before = umfa.stats().cpu_calls
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return out, umfa.stats().cpu_calls - before

umfa.torch.enable()
q = torch.randn(1, 2, 24, 16)
torch.nn.functional.scaled_dot_product_attention(q, q, q)
loader = torch.utils.data.DataLoader(Rows(), num_workers=1, batch_size=None, timeout=60)
for i, (out, calls) in enumerate(loader):
    assert calls == 1
    torch.testing.assert_close(out, torch.full_like(out, float(i)))
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers that are forked")
def test_workers_of_a_data_loader(run_python: Any) -> None:
    """In a process of its own: JAX warns of every fork where it is loaded."""
    done = run_python(WORKERS)
    assert done.stdout == "done\n", done.stderr


def test_an_import_changes_nothing(run_python: Any) -> None:
    done = run_python(
        "import torch, umfa, umfa.torch\n"
        "q = torch.randn(1, 2, 8, 16)\n"
        "torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "assert umfa.stats().cpu_calls == 0 and not umfa.torch.is_enabled()\n"
    )
    assert done.returncode == 0, done.stderr


RACE = """
import sys, threading, time
import torch, umfa, umfa.torch

torch.set_num_threads(1)
q = torch.randn(1, 2, 4, 8)
attend = torch.nn.functional.scaled_dot_product_attention
with umfa.torch.sdpa():
    by_umfa = attend(q, q, q)
by_torch = attend(q, q, q)
stop, failed = threading.Event(), []

def work():
    while not stop.is_set():
        try:
            out = attend(q, q, q)
            assert torch.equal(out, by_umfa) or torch.equal(out, by_torch)
        except BaseException as error:
            failed.append(error)
            raise

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
ends = time.monotonic() + 3
while time.monotonic() < ends and not failed:
    umfa.torch.enable()
    umfa.torch.disable()
stop.set()
for thread in threads:
    thread.join()
assert not failed
print("done")
"""


def test_switching_while_other_threads_run_torch(run_python: Any) -> None:
    """Kernels that came and went crashed within a second here."""
    done = run_python(RACE)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_graphs_are_torch_s_own() -> None:
    """Enabled or not, so that a graph in a cache of torch's is right for both."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def attend(q: Any) -> Any:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    class Module(torch.nn.Module):  # type: ignore[misc]
        def forward(self, q: Any) -> Any:
            return attend(q)

    (q, _, _) = tensors(1, 2, 24, 16)

    def graphs() -> list[Any]:
        with torch.inference_mode():
            inference = make_fx(attend)(q)
        program = torch.export.export(Module(), (q,))
        gradient = make_fx(torch.func.grad(lambda x: attend(x).sum()))(q)
        traced = make_fx(attend, tracing_mode="symbolic")(q)
        found = [inference, gradient, traced, program, program.run_decompositions()]
        return [[node.target for node in x.graph.nodes] for x in found]

    umfa_torch.uninstall()
    never = graphs()
    with umfa_torch.sdpa():
        assert graphs() == never
    assert graphs() == never
    umfa_torch.uninstall()
    assert graphs() == never


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_compiled_function_asks_when_it_runs(
    grad: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a graph from torch's cache on disk, which this fills."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = tensors(1, 2, 24, 16, grad=grad)

    def attend(*x: Any) -> Any:
        return F.scaled_dot_product_attention(*x, is_causal=True) * 2

    expected = attend(*given)
    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend="inductor", fullgraph=True)
        for enabled in (True, False):
            counted = Counted()
            if enabled:
                umfa_torch.enable()
            found = compiled(*given)
            if grad:
                found.sum().backward()
            umfa_torch.disable()
            assert counted.calls == (1 + grad if enabled else 0)
            torch.testing.assert_close(found, expected)


def test_uninstalling() -> None:
    (q, k, v) = tensors(1, 2, 24, 16)
    key = "BackendSelect"
    name = "aten::scaled_dot_product_attention"
    with umfa_torch.sdpa():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        with pytest.raises(ValueError, match=r"\[umfa.torch.uninstall\] umfa is enabled; got 1"):
            umfa_torch.uninstall()
    umfa_torch.enable()
    with pytest.raises(
        ValueError, match=r"got 0 open blocks, .*; enabled by umfa\.torch; expected"
    ):
        umfa_torch.uninstall()
    umfa_torch.disable()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    umfa_torch.uninstall()
    umfa_torch.uninstall()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    counted = Counted()
    with umfa_torch.sdpa(), torch.inference_mode():
        F.scaled_dot_product_attention(q, k, v)
    assert counted.taken == {SDPA: 1}


def test_disabling_first_does_nothing(run_python: Any) -> None:
    done = run_python(
        "import torch, umfa, umfa.torch\n"
        "from torch._C import _dispatch_dump as dump\n"
        "names = ['scaled_dot_product_attention', '_flash_attention_forward']\n"
        "before = [dump(f'aten::{name}') for name in names]\n"
        "umfa.torch.disable()\n"
        "umfa.torch.uninstall()\n"
        "assert [dump(f'aten::{name}') for name in names] == before\n"
        "with umfa.torch.sdpa():\n"
        "    assert [dump(f'aten::{name}') for name in names] != before\n"
        "umfa.torch.uninstall()\n"
        "assert [dump(f'aten::{name}') for name in names] == before\n"
    )
    assert done.returncode == 0, done.stderr


def test_pickles_need_no_umfa(run_python: Any, tmp_path: Any) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    with umfa_torch.sdpa():
        torch.save(layer, tmp_path / "layer.pt")
        (tmp_path / "layer.pickle").write_bytes(pickle.dumps(layer))
    done = run_python(
        "import pickle, sys, torch\n"
        "torch.load('layer.pt', weights_only=False)\n"
        "pickle.load(open('layer.pickle', 'rb'))\n"
        "assert 'umfa' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


FORK = """
import os, torch, umfa, umfa.torch

umfa.torch.enable()
q = torch.randn(1, 2, 24, 16)
attend = torch.nn.functional.scaled_dot_product_attention
expected = attend(q, q, q)
child = os.fork()
if child == 0:
    before = umfa.stats().cpu_calls
    right = torch.equal(attend(q, q, q), expected) and umfa.stats().cpu_calls == before + 1
    umfa.torch.disable()
    attend(q, q, q)
    right = right and umfa.stats().cpu_calls == before + 1
    os._exit(0 if right else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert umfa.torch.is_enabled(), "the child's switch is its own"
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that is forked")
def test_a_process_that_is_forked(run_python: Any) -> None:
    done = run_python(FORK)
    assert done.stdout == "done\n", done.stderr


SPAWNED = """
import torch, umfa, umfa.torch

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        q = torch.ones(1, 1, 4, 8)
        before = umfa.stats().cpu_calls
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return umfa.stats().cpu_calls - before

def enable(worker):
    umfa.torch.enable()

if __name__ == "__main__":
    umfa.torch.enable()
    for function, calls in ((None, 0), (enable, 1)):
        loader = torch.utils.data.DataLoader(
            Rows(), num_workers=1, batch_size=None, timeout=100,
            multiprocessing_context="spawn", worker_init_fn=function,
        )
        assert list(loader) == [calls, calls]
    print("done")
"""


@pytest.mark.slow
def test_workers_that_are_spawned_enable_it_themselves(run_python: Any, tmp_path: Any) -> None:
    (tmp_path / "spawned.py").write_text(SPAWNED)
    done = run_python(
        "import subprocess, sys; sys.exit(subprocess.call([sys.executable, 'spawned.py']))"
    )
    assert done.stdout == "done\n", done.stderr
