"""``python -m umfa.shim metal_sdpa_extension``: the folder to put into ``PYTHONPATH``."""

from __future__ import annotations

import sys

from ._modules import FOLDERS, refuse_if_importable


def main(arguments: list[str]) -> int:
    known = sorted(x.name for x in FOLDERS.iterdir() if x.is_dir() and x.name != "__pycache__")
    if len(arguments) != 1 or arguments[0] not in known:
        print(f"usage: python -m umfa.shim {{{','.join(known)}}}", file=sys.stderr)
        return 2
    refuse_if_importable("umfa.shim", arguments[0])
    print(FOLDERS / arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
