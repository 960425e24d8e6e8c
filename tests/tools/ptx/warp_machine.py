"""Runs what the PTX back end generates, on the emulator's fibers: its optimised IR, with NVIDIA's
instructions replaced by calls of warp_machine.cpp, compiled for this machine.

What remains unseen is LLVM's NVPTX code generator, ptxas and the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.metal.emulator import DispatchError, KernelError, Options, toolchain
from tools.metal.emulator.build import cache_folder
from tools.metal.emulator.checks import bits
from tools.metal.emulator.library import _Dispatch, _Result, _running, _runtime, _three
from tools.metal.ptx.entries import Entry
from tools.metal.ptx.translate import as_cpp, as_ir

_HERE = Path(__file__).resolve().parent
_FOUR = "{ float, float, float, float }"
_ASM = re.compile(
    r"(= (?:tail )?call (?:[\w() ,]+ )?)(void|i32|float|" + re.escape(_FOUR) + r") "
    r'asm (?:sideeffect )?"([^"]*)", "[^"]*"\('
)
_SIMPLE = {
    "movmatrix.sync.aligned.m8n8.trans.b16": "nv_movmatrix",
    "ex2.approx.ftz.f32": "nv_ex2",
    "lg2.approx.f32": "nv_lg2",
    "sin.approx.f32": "nv_sin",
    "cos.approx.f32": "nv_cos",
    "rsqrt.approx.f32": "nv_rsqrt",
    "cvt.rna.tf32.f32": "nv_cvt_tf32",
    "activemask.b32": "nv_activemask",
    "redux.sync.min.u32": "nv_redux_min",
}
# Intrinsics by the start of their name, and who stands in.
_INTRINSICS = {
    "llvm.nvvm.barrier.cta.sync.aligned.all": "nv_barrier",
    "llvm.nvvm.bar.warp.sync": "nv_warp_barrier",
    **{
        f"llvm.nvvm.ldmatrix.sync.aligned.m8n8.{x}.b16.p3": f"nv_ldmatrix_{x.replace('.', '_')}"
        for x in ("x1", "x1.trans", "x4", "x4.trans")
    },
}
_MEETS = ("nv_shfl", "nv_barrier", "nv_warp", "nv_movmatrix", "nv_ldmatrix", "nv_mma", "nv_redux")


def stand_in(asm: str) -> str:
    """The C function for the text of an inline assembly."""
    for start, name in _SIMPLE.items():
        if asm.startswith(start):
            return name
    found = re.search(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.\w+\.f32", asm)
    if not found:
        raise ValueError(f"no stand-in for {asm!r}")
    half = "z, z" in asm or found.group(2) == "tf32"
    return f"nv_mma_k{found.group(1)}_{'half' if half else 'full'}_{found.group(2)}"


def for_this_machine(ir: str) -> str:
    """The IR of kernels as plain functions. Before each operation at which lanes meet stands its
    number, by which the runtime tells whether they meet at the same one."""
    lines = []
    called: dict[str, str] = {}
    site = 0
    for line in ir.split("\n"):
        if line.startswith(("target ", "source_filename")):
            continue
        if line.startswith("attributes "):
            line = re.sub(r'"(?:target-cpu|target-features|nvvm\.[\w.]+)"="[^"]*"', "", line)
        line = line.replace("ptx_kernel ", "")
        # Of a library this is, so that the linker finds it.
        line = line.replace(
            "@umfa_dynamic_memory = external dso_local", "@umfa_dynamic_memory = external hidden"
        )
        if found := _ASM.search(line):
            name = stand_in(found.group(3))
            type_ = "<4 x float>" if found.group(2) == _FOUR else found.group(2)
            called[name] = type_
            line = f"{line[: found.start()]}{found.group(1)}{type_} @{name}({line[found.end() :]}"
        # C returns a vector in one register, but four values otherwise than LLVM does.
        line = re.sub(
            r"extractvalue \{ (float|i32), \1, \1, \1 \} (%[\w.]+), (\d)",
            r"extractelement <4 x \1> \2, i32 \3",
            line,
        )
        line = line.replace("{ i32, i32, i32, i32 } @llvm.nvvm.ldm", "<4 x i32> @llvm.nvvm.ldm")
        for intrinsic, name in _INTRINSICS.items():
            line = line.replace(f"@{intrinsic}(", f"@{name}(")
        line = re.sub(r"@llvm\.nvvm\.([\w.]+)", lambda m: f"@nv_{m[1].replace('.', '_')}", line)
        if " call " in line and any(f"@{name}" in line for name in _MEETS):
            site += 1
            lines.append(f"  store i32 {site}, ptr @umfa_site")
        lines.append(line)
    declarations = [f"declare {type_} @{name}(...)" for name, type_ in called.items()]
    return "\n".join([*lines, "@umfa_site = external global i32", *declarations, ""])


def build(source: Any, **options: Any) -> tuple[Path, list[Entry]]:
    """A shared library with the kernels of a Metal source, as the PTX back end compiles them."""
    code, made, threads = as_cpp(source, **options)
    text = for_this_machine(as_ir(code, threads))
    native = (_HERE / "warp_machine.cpp").read_bytes()
    key = hashlib.sha256(text.encode() + native).hexdigest()[:32]
    cache_folder().mkdir(parents=True, exist_ok=True)
    target = cache_folder() / f"machine-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            work = Path(folder)
            (work / "kernel.ll").write_text(text)
            toolchain.assemble(work / "kernel.ll", work / "kernel.o")
            _link(work / "kernel.o", _machine(), work / "kernel.so")
            os.replace(work / "kernel.so", target)
    return target, made


def _link(kernel: Path, machine: Path, output: Path) -> None:
    toolchain.run(
        [
            toolchain.system_compiler(),
            "-shared",
            "-fPIC",
            str(kernel),
            str(machine),
            "-o",
            str(output),
        ]
    )


@functools.cache
def _machine() -> Path:
    source = _HERE / "warp_machine.cpp"
    key = hashlib.sha256(source.read_bytes() + toolchain.fingerprint().encode()).hexdigest()[:32]
    target = cache_folder() / f"machine-{key}.o"
    if not target.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".o", dir=cache_folder())
        os.close(handle)
        toolchain.run(
            [toolchain.system_compiler(), "-std=c++20", "-O2", "-fPIC", *toolchain.native_flags(),
             "-c", str(source), "-o", name]
        )  # fmt: skip
        os.replace(name, target)
    return target


class WarpLibrary:
    """`tools.metal.emulator.Library` by way of the PTX back end. There are no counters."""

    def __init__(
        self,
        source_or_path: str | Path,
        include_dirs: Sequence[str | Path] = (),
        macros: Mapping[str, Any] | None = None,
        constants: Mapping[int, Any] | None = None,
        *,
        options: Options | None = None,
    ) -> None:
        allow = options.allow if options else frozenset[str]()
        self._how = {
            "source": source_or_path,
            "include_dirs": include_dirs,
            "macros": macros,
            "constants": constants,
            "allow": allow,
        }
        _, made, _ = as_cpp(**self._how)
        self.kernels = tuple(entry.host_name for entry in made)

    def dispatch(
        self,
        kernel: str,
        threadgroups: Any,
        threads: Any,
        buffers: Mapping[int, Any] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        schedule_seed: int = 0,
        *,
        buffer_offsets: Mapping[int, int] | None = None,
    ) -> None:
        if kernel not in self.kernels:
            raise DispatchError(f"no kernel '{kernel}'; there are: {', '.join(self.kernels)}")
        size = _three("threads", threads)
        if np.prod(size) % 32:
            raise DispatchError("an incomplete simdgroup has other lanes here than on Apple's GPUs")
        path, made = build(**self._how, threads=size)
        entry = next(e for e in made if e.host_name == kernel)
        arrays = {
            i: np.frombuffer(b, np.uint8).copy() if isinstance(b, bytes) else b
            for i, b in (buffers or {}).items()
        }
        addresses = [
            arrays[i].ctypes.data + (buffer_offsets or {}).get(i, 0) if i in arrays else 0
            for i in entry.buffers
        ]
        offsets, at = [], 0
        for i in entry.threadgroup:
            offsets.append(at)
            at += (threadgroup_memory or {})[i]
        arguments = [*addresses, *offsets, *size]
        launch(path, entry.symbol, arguments, threadgroups, size, schedule_seed)


def launch(
    path: Path,
    symbol: str,
    arguments: Sequence[int],
    threadgroups: Any,
    threads: Sequence[int],
    schedule_seed: int = 0,
) -> None:
    """Runs an entry of a built library with the arguments that its PTX would take."""
    runtime = _runtime()
    handle = ctypes.CDLL(str(path))
    (ctypes.c_uint64 * 32).in_dll(handle, "machine_arguments")[: len(arguments)] = arguments
    address = ctypes.cast(handle[symbol], ctypes.c_void_p).value
    ctypes.c_void_p.in_dll(handle, "machine_kernel").value = address
    request, result = _Dispatch(), _Result()
    request.checks = bits(frozenset({"divergence", "lanes", "limits"}))
    request.entry = ctypes.cast(handle["machine_entry"], ctypes.c_void_p).value
    request.threadgroups[:] = _three("threadgroups", threadgroups)
    request.threads[:] = _three("threads", threads)
    request.schedule_seed = schedule_seed
    with _running:
        failed = runtime.umfa_run(ctypes.byref(request), ctypes.byref(result))
        check, error = result.check.decode(), result.error.decode()
    if failed:
        raise KernelError(check, symbol, "", error)
