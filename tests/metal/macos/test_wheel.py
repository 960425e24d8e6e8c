"""What the inspection of the cross-built wheel finds; `.ci/run` builds the wheel itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.metal.macos import cross, macho, wheel

GOOD: dict[str, Any] = {
    "arm64": True,
    "name": "@rpath/libumfa.dylib",
    "libraries": [cross.METAL, cross.SYSTEM],
    "rpaths": ["@loader_path"],
    "minimum_macos": cross.FLOOR,
    "signed": True,
    "undefined": {macho.DYNAMIC_LOOKUP: {"_PyErr_Occurred"}, cross.SYSTEM: {"_malloc"}},
}


def findings(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> list[str]:
    pytest.importorskip("nanobind")
    monkeypatch.setattr(macho, "read", lambda _: macho.Image(**GOOD | changed))
    return wheel.check_binary(Path("libumfa.dylib"), {cross.METAL, cross.SYSTEM})


def test_a_sound_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(monkeypatch) == []


@pytest.mark.parametrize(
    ("changed", "finding"),
    [
        ({"arm64": False}, "is not for arm64"),
        ({"signed": False}, "carries no signature"),
        ({"minimum_macos": "15.0"}, "is for macOS 15.0"),
        ({"libraries": [cross.SYSTEM]}, f"needs ['{cross.SYSTEM}']"),
        ({"libraries": [cross.METAL, cross.SYSTEM, "/usr/lib/libc++.1.dylib"]}, "libc++.1.dylib"),
        ({"undefined": {macho.DYNAMIC_LOOKUP: {"_malloc"}}}, "looks up ['_malloc']"),
        ({"undefined": {macho.DYNAMIC_LOOKUP: {"_Py_Private"}}}, "looks up ['_Py_Private']"),
        ({"rpaths": ["/home/me/build"]}, "searches ['/home/me/build']"),
        ({"name": "/home/me/build/libumfa.dylib"}, "calls itself /home/me/build/libumfa.dylib"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_of_a_binary(
    changed: dict[str, Any], finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = findings(monkeypatch, **changed)
    assert finding in found


def test_a_path_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "sound").write_bytes(b"\0@loader_path\0")
    (tmp_path / "library").write_bytes(b"\0/home/me/build/x.o\0")
    assert wheel.check_paths(tmp_path, [Path("/home/me"), Path("/opt")]) == [
        "library names /home/me"
    ]


def unpacked(folder: Path) -> Path:
    """A wheel's files, as far as their names matter."""
    package = folder / "umfa"
    for path in (cross.ROOT / "python" / "umfa").rglob("*"):
        if path.suffix in (".py", ".typed"):
            target = package / path.relative_to(cross.ROOT / "python" / "umfa")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    (package / "include" / "umfa").mkdir(parents=True)
    for path in (cross.ROOT / "include" / "umfa").glob("*.h"):
        (package / "include" / "umfa" / path.name).touch()
    (package / "_ext.pyi").touch()
    (folder / wheel.EXTENSION).touch()
    (folder / wheel.LIBRARY).write_text("#include <metal_stdlib>")
    info = folder / "umfa-0.1.0.dist-info"
    info.mkdir()
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {wheel.TAG}\n")
    (info / "METADATA").write_text("Name: umfa\n")
    return folder


def test_sound_contents(tmp_path: Path) -> None:
    assert wheel.check_contents(unpacked(tmp_path), "Name: umfa\n") == []


@pytest.mark.parametrize(
    ("file", "text", "finding"),
    [
        ("umfa-0.1.0.dist-info/WHEEL", "Tag: cp310-abi3-linux_x86_64\n", "linux_x86_64"),
        ("umfa-0.1.0.dist-info/METADATA", "Name: other\n", "METADATA differs"),
        (wheel.LIBRARY, "", "no text of the kernels"),
        ("umfa/_ext.pyi", None, "['umfa/_ext.pyi'] are missing"),
        ("umfa/_frameworks/_mlx.py", None, "['umfa/_frameworks/_mlx.py'] are missing"),
        ("umfa/include/umfa/umfa.h", None, "['umfa/include/umfa/umfa.h'] are missing"),
    ],
)
def test_faults_of_contents(file: str, text: str | None, finding: str, tmp_path: Path) -> None:
    folder = unpacked(tmp_path)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    (found,) = wheel.check_contents(folder, "Name: umfa\n")
    assert finding in found
