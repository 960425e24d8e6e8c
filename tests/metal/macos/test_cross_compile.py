"""umfa for arm64 macOS, compiled and linked here: nothing is run, and much would be refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.metal.macos import cross, macho


def compile_text(text: str, folder: Path) -> Path:
    source = folder / "text.mm"
    source.write_text("#import <Metal/Metal.h>\n" + text)
    return cross.compile_one(source, folder / "text.o", *cross.CORE, *cross.HOST)


@pytest.mark.parametrize(
    "source",
    # 2 s each. The default run compiles the other files for the double, with the same headers.
    [
        p if p.name == "executor.mm" else pytest.param(p, marks=pytest.mark.slow)
        for p in cross.host_sources()
    ],
    ids=lambda p: p.name,
)
def test_the_host_compiles_for_macos(source: Path, tmp_path: Path) -> None:
    image = macho.read(cross.compile_one(source, tmp_path / "host.o", *cross.CORE, *cross.HOST))
    assert image.arm64
    assert image.minimum_macos == cross.FLOOR


def test_the_host_refers_to_core_graphics(tmp_path: Path) -> None:
    """Linkers may drop unused frameworks; Metal then has no default device."""
    source = cross.ROOT / "src" / "metal" / "device.mm"
    image = macho.read(cross.compile_one(source, tmp_path / "host.o", *cross.CORE, *cross.HOST))
    undefined = set().union(*image.undefined.values())
    assert {"_CGRectNull", "_MTLCopyAllDevices", "_MTLCreateSystemDefaultDevice"} <= undefined


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    # 2 s each. The default run compiles the other files for the double, with the same headers.
    [
        p if p.name == "executor.mm" else pytest.param(p, marks=pytest.mark.slow)
        for p in cross.host_sources()
    ],
    ids=lambda p: p.name,
)
def test_the_host_compiles_with_older_headers_and_for_an_older_macos(
    source: Path, tmp_path: Path
) -> None:
    """Those of macOS 14 and its Xcode; on an older system umfa must find out before it breaks."""
    image = macho.read(
        cross.compile_one(
            source,
            tmp_path / "host.o",
            *(*cross.CORE, *cross.HOST, "-D__MAC_OS_X_VERSION_MAX_ALLOWED=140000"),
            *("-target", "aarch64-macos.13.0"),
        )
    )
    assert image.minimum_macos == "13.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "void f(id<MTLDevice> d) { [d newBufferWithLenght:1 options:0]; }",
            "no known instance method for selector 'newBufferWithLenght:options:'",
        ),
        (
            "void f(MTLCompileOptions* o) { o.mathMode = MTLMathModeSafe; }",
            "'setMathMode:' is only available on macOS 15.0 or newer",
        ),
        (
            "void f(id<MTLDevice> d) { id<MTLBuffer> b = d.name; }",
            "incompatible|cannot initialize",
        ),
    ],
    ids=["misspelt", "too new", "wrong type"],
)
def test_what_the_compiler_refuses(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(cross.CompileError, match=message):
        compile_text(text, tmp_path)


def test_with_a_check_newer_methods_compile(tmp_path: Path) -> None:
    compile_text(
        "void f(MTLCompileOptions* o) { if (@available(macOS 15.0, *)) o.mathMode = "
        "MTLMathModeSafe; }",
        tmp_path,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("nanobind")
    return cross.build(tmp_path_factory.mktemp("macos"))


@pytest.mark.slow
def test_libumfa_needs_metal_and_nothing_strange(built: tuple[Path, Path]) -> None:
    image = macho.read(built[0])
    assert image.arm64
    assert image.signed
    assert image.minimum_macos == cross.FLOOR
    assert set(image.libraries) == cross.MAY_NEED
    assert set(image.undefined) <= cross.MAY_NEED
    assert {"_MTLCopyAllDevices", "_MTLCreateSystemDefaultDevice"} <= image.undefined[cross.METAL]
    # Without it Metal has no default device; -dead_strip_dylibs keeps what is referred to.
    assert "_CGRectNull" in image.undefined[cross.CORE_GRAPHICS]
    assert {"_IOServiceMatching", "_IOObjectRelease"} <= image.undefined[cross.IO_KIT]


@pytest.mark.slow
def test_the_extension_needs_python_and_libumfa(built: tuple[Path, Path]) -> None:
    image = macho.read(built[1])
    assert set(image.libraries) == {"@rpath/libumfa.dylib", cross.SYSTEM}
    assert set(image.undefined) <= {"@rpath/libumfa.dylib", cross.SYSTEM, macho.DYNAMIC_LOOKUP}
    foreign = [
        name
        for name in image.undefined[macho.DYNAMIC_LOOKUP]
        if not name.startswith(("_Py", "__Py"))
    ]
    assert not foreign


@pytest.mark.slow
def test_a_symbol_that_is_not_on_the_list_does_not_link(tmp_path: Path) -> None:
    source = compile_text(
        'extern "C" id MTLCopyAllDevicesWithObserver(id, void*); extern "C" void* f(void);'
        "void* f(void) { return (__bridge void*)MTLCopyAllDevicesWithObserver(nil, nullptr); }",
        tmp_path,
    )
    with pytest.raises(
        cross.CompileError, match="undefined symbol: _MTLCopyAllDevicesWithObserver"
    ):
        cross.link(
            tmp_path / "text.dylib",
            [source],
            *cross.STUBBED,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("abi3audit", "--strict", "--report"), ("check-wheel-contents",)],
    ids=lambda c: c[0],
)
def test_the_wheel_passes(
    command: tuple[str, ...], built: tuple[Path, Path], tmp_path: Path
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (pip install '.[ci]')")
    wheel = cross.wheel(tmp_path, *built)
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
