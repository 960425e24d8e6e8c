"""The types of the double's methods against Apple's, as pyobjc's description of Metal has them.

A method whose name is right and whose arguments are of another kind would compile, and break on a
Mac. Compared is what a call's registers depend on: kinds, widths, and how many there are.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.metal.macos import test_apple_names
from tools.metal import double as metal_double

pytestmark = test_apple_names.pytestmark

OBJECT, POINTER, INTEGER, BOOL = "object", "pointer", "64-bit integer", "bool"
_ENCODINGS = {
    "@": OBJECT,
    "@?": OBJECT,
    "v": "void",
    "d": "double",
    "Z": BOOL,
    "B": BOOL,
    # pyobjc knows signs of enums by chance only; they do not change a call.
    "q": INTEGER,
    "Q": INTEGER,
    "{MTLSize=QQQ}": "struct MTLSize",
}


class Method(NamedTuple):
    owner: str
    selector: str
    result: str
    arguments: tuple[str, ...]


def kind_of_encoding(encoding: bytes) -> str:
    text = encoding.decode().lstrip("nor")  # in, out, const
    return POINTER if text.startswith("^") else _ENCODINGS.get(text, text)


def kind_of_type(spelled: dict[str, str], enums: dict[str, str]) -> str:
    if re.search(r"\bBOOL\b", spelled["qualType"]):
        return BOOL
    text = spelled.get("desugaredQualType", spelled["qualType"])
    text = re.sub(r"\b(__strong|__autoreleasing|_Nullable|_Nonnull|const)\b", "", text)
    text = re.sub(r"<.*>", "", text).strip()
    text = enums.get(text, text)
    if text in ("unsigned long", "long", "unsigned long long", "NSUInteger", "NSInteger"):
        return INTEGER
    if "(^" in text or text == "id":
        return OBJECT
    if text.endswith("*"):
        return POINTER if re.fullmatch(r"void \*|.*\*\s*\*", text) else OBJECT
    return text


@pytest.fixture(scope="module")
def apples() -> dict[str, list[dict[str, Any]]]:
    """What pyobjc says of each selector, once for each class that has one of that name."""
    (archive,) = test_apple_names.FOLDER.glob("pyobjc_framework_[Mm]etal-*.whl")
    with zipfile.ZipFile(archive) as opened:
        tree = ast.parse(opened.read("Metal/_metadata.py"))
    found: dict[str, list[dict[str, Any]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "r":
            owner, selector, facts = map(ast.literal_eval, node.args)
            found.setdefault(selector.decode(), []).append({"owner": owner.decode(), **facts})
    return found


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[Method]:
    """The methods of the double's Metal.h, as clang reads them."""
    source = tmp_path_factory.mktemp("types") / "header.mm"
    source.write_text("#import <Metal/Metal.h>\n")
    done = subprocess.run(
        [
            *(*metal_double.clang(), *metal_double.COMPILE, *metal_double.OBJECTIVE_C),
            *(*metal_double.ARC, "-fsyntax-only", "-Xclang", "-ast-dump=json", str(source)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    tree = json.loads(done.stdout)
    enums = {
        f"enum {node['name']}": node["fixedUnderlyingType"]["qualType"]
        for node in tree["inner"]
        if node["kind"] == "EnumDecl" and "fixedUnderlyingType" in node
    }

    def methods() -> Iterator[Method]:
        for owner in tree["inner"]:
            if owner["kind"] not in ("ObjCProtocolDecl", "ObjCInterfaceDecl"):
                continue
            for node in owner.get("inner", ()):
                if node["kind"] == "ObjCMethodDecl" and owner["name"].startswith("MTL"):
                    yield Method(
                        owner["name"],
                        node["name"],
                        kind_of_type(node["returnType"], enums),
                        tuple(
                            kind_of_type(argument["type"], enums)
                            for argument in node.get("inner", ())
                            if argument["kind"] == "ParmVarDecl"
                        ),
                    )

    return list(methods())


def differences(method: Method, facts: dict[str, Any]) -> list[str]:
    """What pyobjc says otherwise. Of classes it says only what is not an object."""
    whole = facts["owner"] == "NSObject"  # so it calls protocols
    arguments = facts.get("arguments", {})
    found = []
    if (whole or "retval" in facts) and method.result != kind_of_encoding(facts["retval"]["type"]):
        found.append(f"result {method.result}, {facts['retval']['type']}")
    if whole and len(arguments) != len(method.arguments):
        found.append(f"{len(method.arguments)} arguments, {len(arguments)}")
    for index, kind in enumerate(method.arguments, start=2):  # after self and _cmd
        if index in arguments and kind != kind_of_encoding(arguments[index]["type"]):
            found.append(f"argument {index} {kind}, {arguments[index]['type']}")
    return found


def test_types_are_apples(ours: list[Method], apples: dict[str, list[dict[str, Any]]]) -> None:
    assert len(ours) > 45
    compared, unknown, wrong = 0, set(), {}
    for method in ours:
        known = [
            facts
            for facts in apples.get(method.selector, [])
            if facts["owner"] in ("NSObject", method.owner)
        ]
        if not known:
            unknown.add(method.selector)
        for facts in known:
            compared += 1
            if found := differences(method, facts):
                wrong[f"{method.owner} {method.selector}"] = found
    assert not wrong, "ours, Apple's"
    assert compared > 40
    # Properties of four classes that are objects or enums. pyobjc does not describe their types.
    assert unknown == {
        *("languageVersion", "setLanguageVersion:", "mathMode", "setMathMode:"),
        *("mathFloatingPointFunctions", "setMathFloatingPointFunctions:"),
        *("preprocessorMacros", "setPreprocessorMacros:", "setConstantValue:type:atIndex:"),
        *("computeFunction", "setComputeFunction:", "binaryArchives", "setBinaryArchives:"),
        *("url", "setUrl:"),
    }


@pytest.mark.parametrize(
    ("selector", "result", "arguments"),
    [
        ("length", "double", ()),
        ("GPUEndTime", INTEGER, ()),
        ("commit", "void", (OBJECT,)),
        ("newBufferWithLength:options:", OBJECT, (INTEGER, OBJECT)),
        ("setBytes:length:atIndex:", "void", (OBJECT, INTEGER, INTEGER)),
        ("maxThreadsPerThreadgroup", INTEGER, ()),
    ],
)
def test_a_wrong_type_would_show(
    selector: str, result: str, arguments: tuple[str, ...], apples: dict[str, list[dict[str, Any]]]
) -> None:
    method = Method("MTLSomething", selector, result, arguments)
    (facts,) = (facts for facts in apples[selector] if facts["owner"] == "NSObject")
    assert differences(method, facts)
