"""umfa's real Objective-C++ host on Linux: built against the double of Metal, loaded, and driven.

`load` compiles ``src/metal/*.mm``, unchanged, and ``tools/metal/double`` with the clang of PyPI's
``ziglang`` into one library, links it with the installed libumfa, and keeps it in the emulator's
cache. Where umfa itself was built with ``UMFA_METAL=DOUBLE``, that is used.

Between `machine` and its end there is an Apple GPU in this process, as far as umfa can tell.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import umfa
from tools.metal.emulator import toolchain
from tools.metal.emulator.build import cache_folder

CACHES = "UMFA_DOUBLE_CACHES"
"""Environment variable: a folder for umfa's cache folder that outlasts a machine."""
ROOT = Path(__file__).parents[3]
DOUBLE = Path(__file__).parent
HOST = ROOT / "src" / "metal"

COMPILE = (
    *("-std=c++20", "-g", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *(f"-I{ROOT / folder}" for folder in ("src", "shaders", "include")),
    f"-I{DOUBLE}",
)
OBJECTIVE_C = (
    *("-x", "objective-c++", "-fobjc-runtime=macosx-13.0", "-fblocks", "-fno-constant-cfstrings"),
    "-fconstant-string-class=NSConstantString",
    *(f"-I{DOUBLE / folder}" for folder in ("include", "linux")),
)
ARC = ("-fobjc-arc",)


def clang() -> tuple[str, ...]:
    """The C++ driver of the emulator's clang, on the system's headers."""
    zig = Path(toolchain.clang()[0])
    return (*toolchain.clang(), "--driver-mode=g++", "-resource-dir", str(zig.parent / "lib"))


def sources() -> list[Path]:
    return sorted([*HOST.glob("*.mm"), *DOUBLE.rglob("*.mm"), *DOUBLE.rglob("*.cpp")])


def flags_of(source: Path) -> tuple[str, ...]:
    if source.suffix != ".mm":
        return COMPILE
    return (*COMPILE, *OBJECTIVE_C, *(ARC if source.parent == HOST else ()))


def build(extra: tuple[Path, ...] = ()) -> Path:
    """The library, from the cache if nothing has changed. `extra`: more C++ files to put in."""
    library = Path(umfa.get_library())
    digest = _digest_of_sources()
    digest.update(str(library).encode() + library.read_bytes())  # linked by its path
    for file in extra:
        digest.update(file.read_bytes())
    path = cache_folder() / f"double-{digest.hexdigest()[:32]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Test processes that run side by side want the same one: the first builds it.
    with (path.parent / "double.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make(path, library, extra)
    return path


def _digest_of_sources() -> hashlib._Hash:
    """Digest of everything that the objects of the host and the double are built from."""
    digest = hashlib.sha256(repr((clang(), COMPILE, OBJECTIVE_C)).encode())
    for file in sorted([*ROOT.glob("src/**/*"), *ROOT.glob("shaders/**/*.h"), *DOUBLE.rglob("*")]):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest


def _make(path: Path, library: Path, extra: tuple[Path, ...]) -> None:
    # Kept, because libraries with other extra files link the same objects.
    folder = path.parent / f"double-objects-{_digest_of_sources().hexdigest()[:32]}"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:

        def compile_one(source: Path) -> str:
            name = f"{hashlib.sha256(str(source).encode()).hexdigest()[:16]}-{source.name}.o"
            output = (Path(work) if source in extra else folder) / name
            if not output.exists():
                made = Path(work) / f"new-{name}"
                command = [*clang(), *flags_of(source), "-c", str(source), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
                os.replace(made, output)
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, [*sources(), *extra]))
        linked = Path(work) / "double.so"
        toolchain.run(
            [
                *(toolchain.system_compiler(), "-shared", "-Wl,-z,defs", *objects, str(library)),
                *(f"-Wl,-rpath,{library.parent}", "-lpthread", "-o", str(linked)),
            ]
        )
        os.replace(linked, path)


class _Device(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("architecture", ctypes.c_char_p),
        ("family", ctypes.c_int32),
        ("unified", ctypes.c_int32),
        ("driver", ctypes.c_char_p),
        ("same_id", ctypes.c_int32),
        ("cores_kind", ctypes.c_int32),
        ("cores", ctypes.c_int64),
    )


class _Machine(ctypes.Structure):
    _fields_ = (
        ("device_count", ctypes.c_int32),
        ("devices", ctypes.POINTER(_Device)),
        ("listed", ctypes.c_int32),
        ("usual", ctypes.c_int32),
        ("max_threads", ctypes.c_int32),
        ("shuffle", ctypes.c_int32),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_uint32),
        ("is_bytes", ctypes.c_uint32),
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("constant_count", ctypes.c_uint32),
        ("constant_indices", ctypes.POINTER(ctypes.c_uint32)),
        ("constant_types", ctypes.POINTER(ctypes.c_uint32)),
        ("constant_values", ctypes.POINTER(ctypes.c_int32)),
        ("buffer_count", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("threadgroups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
    )


_PREPARE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(_Kernel),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_char),
    ctypes.c_size_t,
)
_RUN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Kernel), ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)

# Kinds of umfa_double_fault_kind, in its order.
FAULTS = (
    "queue",
    "library",
    "function",
    "pipeline",
    "pipeline_threads",
    "pipeline_memory",
    "buffer",
    "no_copy",
    "command_buffer",
    "encoder",
    "execution",
    "registry",
    "archive",
    "archive_add",
    "archive_write",
    "archive_crash",
)

SWITCHES = {"pipeline_archive": "0", "background_compile": "0", "tune": "0"}
"""Environment variables of umfa, without ``UMFA_``, and their values while a test has a machine."""

_RESULTS = {
    "umfa_double_live": ctypes.c_int64,
    "umfa_double_without_pool": ctypes.c_int64,
    "umfa_double_violations": ctypes.c_int64,
    "umfa_double_count": ctypes.c_int64,
    "umfa_double_compile": ctypes.c_int32,
    "umfa_double_new_buffer": ctypes.c_void_p,
    "umfa_double_buffer_contents": ctypes.c_void_p,
    "umfa_double_new_buffer_on": ctypes.c_void_p,
    "umfa_double_new_queue": ctypes.c_void_p,
    "umfa_double_new_queue_on": ctypes.c_void_p,
    "umfa_double_new_command_buffer": ctypes.c_void_p,
}
_ARGUMENTS = {
    "umfa_double_fault": (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64),
    "umfa_double_count": (ctypes.c_int32,),
    "umfa_double_self_test_patience": (ctypes.c_int64,),
    "umfa_double_new_buffer": (ctypes.c_uint64,),
    "umfa_double_new_buffer_on": (ctypes.c_int32, ctypes.c_uint64),
    "umfa_double_new_queue_on": (ctypes.c_int32,),
    "umfa_double_buffer_contents": (ctypes.c_void_p,),
    "umfa_double_new_command_buffer": (ctypes.c_void_p,),
    "umfa_double_commit": (ctypes.c_void_p,),
    "umfa_double_wait": (ctypes.c_void_p,),
    "umfa_double_status": (ctypes.c_void_p,),
    "umfa_double_object_release": (ctypes.c_void_p,),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The double in `path`, with the types of its functions."""
    library = ctypes.CDLL(str(path))
    for name, result in _RESULTS.items():
        getattr(library, name).restype = result
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def built_in() -> bool:
    """Whether the installed umfa is a build with UMFA_METAL=DOUBLE."""
    return hasattr(ctypes.CDLL(umfa.get_library()), "umfa_double_live")


@functools.cache
def load() -> ctypes.CDLL:
    return open_library(Path(umfa.get_library()) if built_in() else build())


class Bound(NamedTuple):
    """A buffer of a dispatch."""

    data: int
    length: int
    offset: int
    is_bytes: bool


@dataclass
class Kernel:
    """What a pipeline is made of; with `buffers`, `threadgroups` and `threads`, a dispatch."""

    source: str
    name: str
    constants: dict[int, bool | int]
    buffers: dict[int, Bound] = field(default_factory=dict)
    threadgroups: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()


_TYPES: Mapping[int, Callable[[int], bool | int]] = {29: int, 53: bool}


def _kernel(pointer: Any) -> Kernel:
    k = pointer.contents
    return Kernel(
        k.source.decode(),
        k.kernel.decode(),
        {
            k.constant_indices[i]: _TYPES[k.constant_types[i]](k.constant_values[i])
            for i in range(k.constant_count)
        },
        {
            b.index: Bound(b.data, b.length, b.offset, bool(b.is_bytes))
            for b in k.buffers[: k.buffer_count]
        },
        tuple(k.threadgroups),
        tuple(k.threads),
    )


class Device(NamedTuple):
    """What an MTLDevice says of itself, and the I/O registry of its driver."""

    name: str = "Apple M1"
    architecture: str = "applegpu_g13g"
    family: int = 7
    unified: bool = True
    driver: str = "AGXAcceleratorG13G"
    """Its class in the registry; empty: there is none."""
    same_id: bool = True
    """Whether Metal's registryID is that of the driver."""
    cores: int | str | None = None
    """The driver's "gpu-core-count"; a str: as text, which it should not be."""

    def described(self) -> _Device:
        kind = 0 if self.cores is None else 1 if isinstance(self.cores, int) else 2
        return _Device(
            *(self.name.encode(), self.architecture.encode(), self.family, self.unified),
            *(self.driver.encode(), self.same_id, kind, int(self.cores or 0)),
        )


PARAVIRTUAL = Device("Apple Paravirtual device", "paravirtual", family=5, driver="AppleParavirtGPU")
"""What a virtual Mac shows, hosted CI among them: GPU family Apple5, no matrix operations."""


class Gpu:
    """Who computes. A subclass runs kernels; what it raises is the command buffer's error."""

    def prepare(self, kernel: Kernel) -> int:
        """Static threadgroup memory of a pipeline in bytes."""
        raise NotImplementedError

    def run(self, kernel: Kernel) -> None:
        """One dispatch."""
        raise NotImplementedError


def _text(function: Callable[..., int], capacity: int = 1 << 16) -> tuple[int, str]:
    buffer = ctypes.create_string_buffer(capacity)
    count = function(buffer, ctypes.c_size_t(capacity))
    return count, buffer.value.decode()


class Double:
    """The handle that tests hold; see runtime/double.h."""

    def __init__(self, library: ctypes.CDLL, gpu: Gpu) -> None:
        self.library = library
        self.gpu = gpu
        self.errors: list[BaseException] = []  # of the GPU, as Python saw them
        self._prepare = _PREPARE(self._on_prepare)
        self._run = _RUN(self._on_run)

    def _guarded(self, body: Callable[[], None], error: Any, capacity: int) -> int:
        try:
            body()
        except BaseException as reason:
            self.errors.append(reason)
            text = f"{type(reason).__name__}: {reason}".encode()[: capacity - 1]
            ctypes.memmove(error, text + b"\0", len(text) + 1)
            return 1
        return 0

    def _on_prepare(self, kernel: Any, static_bytes: Any, error: Any, capacity: int) -> int:
        def body() -> None:
            static_bytes[0] = self.gpu.prepare(_kernel(kernel))

        return self._guarded(body, error, capacity)

    def _on_run(self, kernel: Any, error: Any, capacity: int) -> int:
        return self._guarded(lambda: self.gpu.run(_kernel(kernel)), error, capacity)

    def set_machine(
        self,
        *,
        present: bool = True,
        name: str = "Apple M1",
        architecture: str = "applegpu_g13g",
        family: int = 7,
        devices: Sequence[Device] | None = None,
        listed: int | None = None,
        usual: int | None = 0,
        max_threads: int = 1024,
        shuffle: int = 0,
    ) -> None:
        """Which GPUs there are, from the next time that umfa looks.

        Parameters
        ----------
        present, name, architecture, family
            Of the only GPU.
        devices
            Several GPUs, or none.
        listed
            How many of them MTLCopyAllDevices has, from the first; by default all.
        usual
            The one that MTLCreateSystemDefaultDevice returns; None: nil.
        max_threads
            What every pipeline takes.
        shuffle
            Seed of the order in which unordered dispatches run.
        """
        if devices is None:
            devices = [Device(name, architecture, family)] if present else []
        self.library.umfa_double_release()
        described = (_Device * len(devices))(*(device.described() for device in devices))
        self.library.umfa_double_set_machine(
            ctypes.byref(
                _Machine(
                    len(devices),
                    described,
                    len(devices) if listed is None else listed,
                    -1 if usual is None else usual,
                    max_threads,
                    shuffle,
                )
            )
        )

    def fault(self, kind: str, *, skip: int = 0, count: int = 1, value: int = 0) -> None:
        """After `skip` times, the operation fails `count` times."""
        self.library.umfa_double_fault(FAULTS.index(kind), skip, count, value)

    def compiled(self) -> tuple[int, int]:
        """(libraries from text, pipelines) that Metal's compiler has made so far."""
        libraries, pipelines = (self.library.umfa_double_count(kind) for kind in range(2))
        return libraries, pipelines

    def self_test_patience(self, seconds: float) -> None:
        """Sets after how long a case of the self-test counts as hung."""
        self.library.umfa_double_self_test_patience(round(1000 * seconds))

    def live(self, patience: float = 5) -> tuple[int, str]:
        """Objects that live, and which, after umfa has let go of what it keeps between calls.

        The queue's thread lets go of a command buffer a moment after the waiting call goes on.
        """
        self.library.umfa_double_release()
        end = time.monotonic() + patience
        while (found := _text(self.library.umfa_double_live))[0] > 0 and time.monotonic() < end:
            time.sleep(0.001)
        return found

    def violations(self) -> tuple[int, str]:
        """What Metal's validation would have stopped at since the last time."""
        return _text(self.library.umfa_double_violations)

    def compile_with_macro(self, name: str, value: str) -> str:
        """What Metal's compiler says of an empty text with one of preprocessorMacros."""
        error = ctypes.create_string_buffer(4096)
        compile_ = self.library.umfa_double_compile
        failed = compile_(name.encode(), value.encode(), error, ctypes.c_size_t(4096))
        return error.value.decode() if failed else ""

    def start(self, self_test: str = "0", **switches: str) -> None:
        """`self_test`: UMFA_SELF_TEST until stop(). Off by default: it is slow on the emulator.
        `switches`: those of `SWITCHES`, by their names; they too are off by default, so that tests
        do not depend on the user's files and on each other. For the same reason umfa gets a cache
        folder that lasts until stop(), or is in that of `CACHES`: a self-test that passed on the
        emulator would be believed on any GPU of that name."""
        wanted = {**SWITCHES, **switches}
        unknown = wanted.keys() - SWITCHES.keys()
        assert not unknown, unknown
        environment = {"UMFA_SELF_TEST": self_test}
        environment |= {f"UMFA_{name.upper()}": value for name, value in wanted.items()}
        self._caches = tempfile.TemporaryDirectory()
        environment["UMFA_METAL_CACHE"] = str(cache_folder())
        environment["XDG_CACHE_HOME"] = os.environ.get(CACHES, self._caches.name)
        self._before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        self.self_test_patience(300)  # the emulator takes seconds to compile
        self.library.umfa_double_clear_faults()
        self.library.umfa_double_set_gpu(self._prepare, self._run)
        self.set_machine()
        self.library.umfa_double_install(1)
        self._without_pool = self.library.umfa_double_without_pool()

    def stop(self) -> None:
        """Takes the GPU away, and fails if it was not used properly."""
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self.library.umfa_double_clear_faults()
        count, alive = self.live()
        self.library.umfa_double_install(0)
        self.set_machine(present=False)
        self.library.umfa_double_set_gpu(_PREPARE(), _RUN())
        self._caches.cleanup()
        violations, what = self.violations()
        assert violations == 0, f"Metal would not have accepted:\n{what}"
        assert count == 0, f"{count} Metal and Foundation objects are left over:\n{alive}"
        without_pool = self.library.umfa_double_without_pool() - self._without_pool
        assert without_pool == 0, f"{without_pool} objects autoreleased without a pool"


@contextmanager
def machine(gpu: Gpu, self_test: str = "0", **switches: str) -> Iterator[Double]:
    """An Apple GPU for umfa. On the way out: no object may be left, nothing misused. `self_test`,
    `switches`: as in `Double.start`."""
    double = Double(load(), gpu)
    double.start(self_test, **switches)
    try:
        yield double
    finally:
        double.stop()
