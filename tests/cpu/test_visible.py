"""shaders/shared/visible.h, the one definition of what a query sees, against its definition.

One query, N queries in vectors, and the bounds of a block of queries must say the same.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.array_libraries import Array
from tests.cpu import test_kernel_math as kernel_math

SOURCE = Path(__file__).with_name("visible.cpp")
LANES, TILE = 32, 96  # as visible.cpp has them
ANSWER = np.dtype(
    [
        ("some", "i8", 2),
        ("all", "i8", 2),
        ("next", "i8"),
        ("after", "i8"),
        ("span", "i8", 2),
        ("touches", "i8"),
        ("covers", "i8"),
        ("bounds", "i8", (LANES, 2)),
        ("by_row", "u1", (LANES, TILE)),
        ("by_lane", "u1", (LANES, TILE)),
        ("by_key", "u1", (LANES, TILE)),
    ],
    align=True,
)
LARGEST = UNBOUNDED = 2**31 - 1


class Question(NamedTuple):
    """A rule, `queries` queries from `first` on, and a tile of keys."""

    seqlen_kv: int
    offset: int
    left: int
    right: int
    chunk: int
    chunk_offset: int
    prefix: int
    first: int
    queries: int
    tile: int
    keys: int

    def shown(self, queries: int) -> Array:
        """(queries, keys): the definition, over the keys of the tile."""
        p = np.arange(self.first, self.first + queries, dtype=np.int64)[:, None] + self.offset
        j = np.arange(self.tile, self.tile + self.keys, dtype=np.int64)[None, :]
        sees = np.ones((queries, self.keys), bool)
        if self.left != UNBOUNDED:
            sees &= j >= p - self.left
        if self.right != UNBOUNDED:
            sees &= j <= p + self.right
        if self.chunk > 0:
            shift = self.chunk_offset
            sees &= (j + shift) // self.chunk == (p + shift) // self.chunk
        return sees | (j < self.prefix)

    @property
    def exact(self) -> bool:
        """Whether bounds of blocks are: in chunks, windows beside the diagonal may hold no key."""
        return self.chunk == 0 or (self.left >= 0 and self.right >= 0)


Ask = Callable[[list[Question]], Array]


# Overflow ends the program.
TRAPS = ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
BUILDS = {"trapping": TRAPS, "vectors": kernel_math.FLAGS[kernel_math.USABLE[0]]}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Answers of one build. The others must be equal, which is faster than checking each."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("visible")
    for name, more in BUILDS.items():
        flags = ("-std=c++20", "-O3", "-w", *more, f"-I{kernel_math.ROOT / 'shaders'}")
        command = [*compiler.split(), *flags, SOURCE, "-o", folder / name]
        subprocess.run(command, check=True)
        said = subprocess.run([folder / name, "lanes"], stdout=subprocess.PIPE, check=True).stdout
        assert said.split() == [b"%d" % LANES, b"%d" % TILE]

    def call(questions: list[Question]) -> Array:
        given = np.array(questions, np.int64).tobytes()
        answers = []
        for name in BUILDS:
            done = subprocess.run([folder / name], input=given, capture_output=True, check=False)
            assert done.returncode == 0, f"{name}: {done.stderr.decode()}"
            answers.append(np.frombuffer(done.stdout, ANSWER))
        for other in answers[1:]:
            assert other.tobytes() == answers[0].tobytes(), f"{tuple(BUILDS)} differ"
        return answers[0]

    return call


def check(ask: Ask, questions: list[Question]) -> None:
    for question, answer in zip(questions, ask(questions), strict=True):
        sees = question.shown(LANES)
        for way in ("by_row", "by_lane"):
            found = answer[way].astype(bool)
            np.testing.assert_array_equal(found[:, : question.keys], sees, f"{way}: {question}")
            assert not found[:, question.keys :].any(), f"{way}: {question}"
        sees = sees[: question.queries]
        by_key = answer["by_key"].astype(bool)[: question.queries, : question.keys]
        np.testing.assert_array_equal(by_key, sees, f"by_key: {question}")
        assert answer["touches"] >= sees.any(), question
        assert answer["covers"] == sees.all() if question.exact else answer["covers"] <= sees.all()
        some, every = np.flatnonzero(sees.any(0)), np.flatnonzero(sees.all(0))
        for keys, (begin, end) in ((some, answer["some"]), (every, answer["all"])):
            bounds = [begin, end] if begin < end else []
            runs = np.split(keys, np.flatnonzero(np.diff(keys) > 1) + 1)
            if keys is every:  # the longer one, where they are two ranges
                keys = max(reversed(runs), key=len)
            if keys is not some or question.exact:
                assert len(runs) <= 2, question
                assert bounds == ([keys[0], keys[-1] + 1] if keys.size else []), question
            elif keys.size:
                assert begin <= keys[0] <= keys[-1] < end, question
        if some.size:
            begin, end = answer["span"] - question.tile
            assert begin <= some[0] <= some[-1] < end, question


def tiles(length: int, keys: int) -> list[tuple[int, int]]:
    return [(tile, min(keys, length - tile)) for tile in range(0, length, keys)]


def test_one_query_and_many_agree_on_a_dense_sweep(ask: Ask) -> None:
    bounds = [(UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (0, 0), (5, UNBOUNDED), (3, 4), (40, 0)]
    bounds += [(0, 70), (200, 200), (-3, 9), (12, -5), (-30, 30), (UNBOUNDED, -7), (-7, UNBOUNDED)]
    bounds += [(-4, 3), (-4, -4)]
    questions = [
        Question(
            seqlen_kv,
            offset,
            left,
            right,
            *chunk,
            min(prefix, seqlen_kv),
            first,
            queries,
            tile,
            keys,
        )
        for seqlen_kv, offset, (left, right), (*chunk, prefix), (
            first,
            queries,
        ) in itertools.product(
            [1, 31, 70],
            [-100, -40, -33, -32, -1, 0, 1, 20, 69, 90],
            bounds,
            [(0, 0, 0), (1, 0, 0), (7, 0, 9), (32, 0, 0), (100, 0, 33), (7, 6, 0), (32, 9, 70)],
            [(0, 32), (0, 1), (8, 5), (64, 31)],
        )
        for tile, keys in tiles(seqlen_kv, 24)
    ]
    check(ask, questions)


NEAR_BOUNDS = [
    (UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (5, 3), (LARGEST - 1,) * 2, (2**30, 9),
    (-(2**30), LARGEST - 1), (LARGEST - 1, -(2**30)), (-LARGEST, UNBOUNDED), (UNBOUNDED, -LARGEST),
]  # fmt: skip


def test_bounds_near_the_largest_length(ask: Ask) -> None:
    """int, the GPU's type, holds everything: visible.cpp compares it with int64_t."""
    near = [LARGEST, LARGEST - 1, LARGEST - 40, 2**30, 77, 1]
    questions = []
    for seqlen_kv, seqlen_q in itertools.product(near, near):
        for offset in {seqlen_kv - seqlen_q, 0}:
            for first in {0, max(0, seqlen_q // 2 - 3), max(0, seqlen_q - LANES)}:
                middle = min(max(0, first + offset), seqlen_kv - 1)
                for begin in {0, middle // TILE * TILE, (seqlen_kv - 1) // TILE * TILE}:
                    block = (first, min(LANES, seqlen_q - first), begin)
                    keys = min(TILE, seqlen_kv - begin)
                    questions += [
                        Question(seqlen_kv, offset, left, right, *chunk, prefix, *block, keys)
                        for prefix in {0, min(50, seqlen_kv), seqlen_kv}
                        for left, right in NEAR_BOUNDS
                        for chunk in [(0, 0), (1, 0), (10, 3), (2**30, 9), (LARGEST, LARGEST - 1)]
                    ]
    check(ask, questions)


def test_tiles_of_a_block(ask: Ask) -> None:
    """next_tile() and tile_after() walk over the tiles that some query sees, and over no other."""
    rules = [
        (500, offset, left, right, *chunk, prefix, first, queries)
        for offset, (left, right), chunk, prefix, (first, queries) in itertools.product(
            [-250, -20, 0, 130, 470],
            [(UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (10, 0), (100, 150), (-20, 60), (90, -40)],
            [(0, 0), (50, 0), (192, 100)],
            [0, 90, 400],
            [(0, 32), (100, 20), (230, 1)],
        )
    ]
    places = tiles(500, TILE)
    questions = [Question(*rule, tile, keys) for rule in rules for tile, keys in places]
    answers = ask(questions)
    found, after = (answers[x].reshape(len(rules), len(places)) for x in ("next", "after"))
    for n, rule in enumerate(rules):
        seen = [tile for tile, keys in places if Question(*rule, tile, keys).shown(rule[8]).any()]
        expected = [min((s for s in seen if s >= tile), default=500) for tile, _ in places]
        later = [min((s for s in seen if s > tile), default=500) for tile in seen]
        steps = [after[n][tile // TILE] for tile in seen]
        if rule[6] == 0:
            assert steps == [min(tile + TILE, 500) for tile in seen], rule
        elif Question(*rule, 0, 0).exact:
            assert steps == later, rule
        else:
            assert all(x <= y for x, y in zip(steps, later, strict=True)), rule
        if Question(*rule, 0, 0).exact:
            assert found[n].tolist() == expected, rule
        else:
            assert all(x <= y for x, y in zip(found[n].tolist(), expected, strict=True)), rule
