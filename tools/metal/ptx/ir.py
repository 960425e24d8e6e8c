"""What LLVM's NVPTX target needs otherwise than clang writes it, changed in the IR's text."""

from __future__ import annotations

import re

_ADDRESS_SPACE_CAST = re.compile(r"addrspacecast (ptr addrspace\(1\) .*? to ptr addrspace\(1\))")
_COMDAT = re.compile(r"^\$.* = comdat any\n", re.MULTILINE)
_SHARED = re.compile(
    r"^(@\S+ = (?:[\w()]+ )*?addrspace\(3\) global .*?) (?:zeroinitializer|undef)(.*?), align \d+",
    re.MULTILINE,
)
_VISIBLE = re.compile(
    r"^(@\S+ = )(?:dso_local )?((?:local_)?(?:unnamed_addr )?addrspace\(1\) (?:constant|global) )",
    re.MULTILINE,
)
_ENTRY = re.compile(r"^(define .*?ptx_kernel .*?)( \{)$", re.MULTILINE)


# Threads that a multiprocessor should hold at once: what is left of its registers for one of them
# is 128. ptxas.py asks for fewer where that is too little.
RESIDENT_THREADS = 512


def for_nvptx(text: str, threads: int | None) -> str:
    """The unoptimised IR of a library, made fit for NVPTX.

    ``constant`` memory becomes global memory, since NVPTX has no address space 2 of that meaning.
    Nothing but the entries is visible from outside, so that what they do not use goes. Threadgroup
    variables are uninitialised, and aligned for the widest access.
    """
    text = text.replace("addrspace(2)", "addrspace(1)")
    text = _ADDRESS_SPACE_CAST.sub(r"bitcast \1", text)
    text = re.sub(r",? comdat(?:\(\S+\))?(?=[, \n])", "", _COMDAT.sub("", text))
    text = _VISIBLE.sub(r"\1internal \2", text)
    text = re.sub(r"\b(?:linkonce_odr|weak_odr)\b", "internal", text)
    text = _SHARED.sub(r"\1 undef\2, align 16", text)
    if threads is not None:
        blocks = -(-RESIDENT_THREADS // threads)
        text = _ENTRY.sub(rf'\1 "nvvm.maxntid"="{threads}" "nvvm.minctasm"="{blocks}"\2', text)
    return text
