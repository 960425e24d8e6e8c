"""The double's declarations against Apple's own, as two packages on PyPI have them.

    pip download --no-deps --no-binary pymetal-cpp pymetal-cpp==0.1.5
    pip download --no-deps --only-binary :all: --python-version 3.12 \
        --platform macosx_10_13_universal2 pyobjc-framework-Metal

``UMFA_APPLE_API`` names the folder with the two files. metal-cpp, inside the first, is Apple's; it
has every selector of Metal as a string. The second has the values of the enums.
"""

from __future__ import annotations

import ast
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.metal.macos import cross, macho

FOLDER = Path(os.environ.get("UMFA_APPLE_API", ""))

pytestmark = pytest.mark.skipif(
    "UMFA_APPLE_API" not in os.environ, reason="UMFA_APPLE_API is not set; see test_apple_names.py"
)

# Of Foundation, known from its documentation: metal-cpp has no use for them.
BEYOND_METAL_CPP = {"initWithBytes:length:encoding:", "new", "class", "isKindOfClass:"}


@pytest.fixture(scope="module")
def metal_cpp() -> str:
    """The headers of metal-cpp, one after the other."""
    (archive,) = FOLDER.glob("pymetal_cpp-*.tar.gz")
    with tarfile.open(archive) as opened:
        return "\n".join(
            stream.read().decode()
            for member in opened.getmembers()
            if "/metal-cpp/" in member.name
            and member.name.endswith(".hpp")
            and (stream := opened.extractfile(member)) is not None
        )


@pytest.fixture(scope="module")
def apple_enums() -> dict[str, int]:
    (archive,) = FOLDER.glob("pyobjc_framework_[Mm]etal-*.whl")
    with zipfile.ZipFile(archive) as opened:
        text = opened.read("Metal/_metadata.py").decode()
    found = re.search(r'^enums = """(.*?)"""', text, re.MULTILINE | re.DOTALL)
    assert found is not None
    pairs = (entry.split("@") for entry in found[1].split("$") if "@" in entry)
    return {name: int(value) for name, value in pairs}


def test_every_selector_is_apples(metal_cpp: str, tmp_path: Path) -> None:
    known = set(re.findall(r'_(?:MTL|NS)_PRIVATE_DEF_SEL\(\s*\w+,\s*"([^"]+)"', metal_cpp))
    assert len(known) > 1000
    sent: set[str] = set()
    for source in cross.host_sources():
        output = tmp_path / f"{source.name}.o"
        sent |= macho.read(cross.compile_one(source, output, *cross.CORE, *cross.HOST)).selectors
    assert len(sent) > 40
    assert sent - known == BEYOND_METAL_CPP


def double_enums() -> dict[str, int]:
    """The constants of the double's Metal.h."""
    header = (cross.HEADERS / "Metal" / "Metal.h").read_text()
    found: dict[str, int] = {}
    for name, value in re.findall(r"\b(MTL\w+) = ([^,}]+)", header):
        tree = ast.parse(value.strip(), mode="eval")
        assert all(
            isinstance(n, (ast.Expression, ast.BinOp, ast.Constant, ast.LShift, ast.Add))
            for n in ast.walk(tree)
        )
        found[name] = int(eval(compile(tree, "Metal.h", "eval")))
    return found


def test_every_constant_is_apples(apple_enums: dict[str, int]) -> None:
    ours = double_enums()
    assert len(ours) > 20
    wrong = {
        name: (value, apple_enums.get(name))
        for name, value in ours.items()
        if apple_enums.get(name) != value
    }
    assert not wrong, "name: (ours, Apple's)"


def test_a_wrong_constant_would_show(apple_enums: dict[str, int]) -> None:
    assert apple_enums["MTLCommandBufferStatusError"] == 5
    assert apple_enums["MTLDataTypeInt"] == 29


def test_the_constant_that_older_headers_lack(apple_enums: dict[str, int]) -> None:
    (value,) = re.findall(
        r"apple10 = static_cast<MTLGPUFamily>\((\d+)\)",
        (cross.ROOT / "src" / "metal" / "device.mm").read_text(),
    )
    assert apple_enums["MTLGPUFamilyApple10"] == int(value)
