"""Just enough of Mach-O to see what a 64-bit image needs, and which selectors it sends."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_MAGIC = 0xFEEDFACF
_SEGMENT, _SYMTAB, _LOAD_DYLIB, _SIGNATURE, _BUILD_VERSION = 0x19, 0x2, 0xC, 0x1D, 0x32
_ID_DYLIB, _RPATH = 0xD, 0x8000001C
_UNDEFINED_TYPE, _IN_SECTION, _TYPE_MASK, _EXTERNAL, _STAB = 0x0, 0x0E, 0x0E, 0x01, 0xE0
DYNAMIC_LOOKUP = "looked up when loaded"


class Section(NamedTuple):
    """A part of a segment; `offset` is in the file."""

    segment: str
    name: str
    address: int
    size: int
    offset: int


@dataclass
class Image:
    """A library, or an object file, where `libraries` is empty."""

    arm64: bool
    name: str = ""
    """By which those that link with it will look for it."""
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    minimum_macos: str = ""
    signed: bool = False
    undefined: dict[str, set[str]] = field(default_factory=dict)
    """Symbols by the library that has them."""
    selectors: set[str] = field(default_factory=set)
    sections: list[Section] = field(default_factory=list)
    defined: dict[str, tuple[Section, int]] = field(default_factory=dict)
    """Symbols by name: the section that holds them, and their address."""

    def content(self, path: Path, symbol: str, size: int) -> bytes:
        """The first bytes of a symbol that the image at `path`, this one, defines."""
        section, address = self.defined[symbol]
        start = section.offset + address - section.address
        if address + size > section.address + section.size:
            raise ValueError(f"{symbol} has no {size} bytes in its section")
        return path.read_bytes()[start : start + size]


def read(path: Path) -> Image:
    data = path.read_bytes()
    magic, cpu, _, _, commands, _, _, _ = struct.unpack_from("<8I", data)
    if magic != _MAGIC:
        raise ValueError(f"{path} is no 64-bit Mach-O file")
    image = Image(arm64=cpu == 0x0100000C)
    at, symtab = 32, None
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _LOAD_DYLIB:
            image.libraries.append(_string(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == _ID_DYLIB:
            image.name = _string(data, at + struct.unpack_from("<I", data, at + 8)[0])
        elif command == _RPATH:
            image.rpaths.append(_string(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == _BUILD_VERSION:
            version = struct.unpack_from("<I", data, at + 12)[0]
            image.minimum_macos = f"{version >> 16}.{version >> 8 & 255}"
        elif command == _SIGNATURE:
            image.signed = True
        elif command == _SYMTAB:
            symtab = struct.unpack_from("<4I", data, at + 8)
        elif command == _SEGMENT:
            image.sections += _sections(data, at)
        at += size
    for section in image.sections:
        if section.name == "__objc_methname":
            names = data[section.offset : section.offset + section.size].decode()
            image.selectors |= set(filter(None, names.split("\0")))
    if symtab:
        _read_symbols(data, image, *symtab)
    return image


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _sections(data: bytes, at: int) -> list[Section]:
    found = []
    for i in range(struct.unpack_from("<I", data, at + 64)[0]):
        start = at + 72 + 80 * i
        name, segment = (data[n : n + 16].rstrip(b"\0").decode() for n in (start, start + 16))
        found.append(Section(segment, name, *struct.unpack_from("<QQI", data, start + 32)))
    return found


def _read_symbols(
    data: bytes, image: Image, offset: int, count: int, strings: int, _size: int
) -> None:
    for i in range(count):
        name, kind, number, description, value = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
        if not kind & _STAB and kind & _TYPE_MASK == _IN_SECTION:
            image.defined[_string(data, strings + name)] = (image.sections[number - 1], value)
        if kind & _STAB or kind & _TYPE_MASK != _UNDEFINED_TYPE or not kind & _EXTERNAL:
            continue
        ordinal = description >> 8
        # 0, 254 and 255 stand for no certain library.
        certain = 0 < ordinal <= len(image.libraries)
        library = image.libraries[ordinal - 1] if certain else DYNAMIC_LOOKUP
        image.undefined.setdefault(library, set()).add(_string(data, strings + name))
