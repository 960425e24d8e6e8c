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
        ("seers_touch", "i8"),
        ("seers_cover", "i8"),
        ("seers_some", "i8", 2),
        ("by_seer", "u1", (LANES, TILE)),
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
    seqlen_q: int = 0  # 0: the block ends it

    def shown(self, queries: int) -> Array:
        """(queries, keys): the definition, over the keys of the tile."""
        return shown(np.array([self], np.int64))[0, :queries, : self.keys]

    @property
    def exact(self) -> bool:
        """Whether bounds of blocks are: in chunks, windows beside the diagonal may hold no key."""
        return self.chunk == 0 or (self.left >= 0 and self.right >= 0)


def shown(questions: Array) -> Array:
    """(questions, LANES, TILE): which keys each query sees, by the definition."""
    columns = questions[:, :, None, None]
    _, offset, left, right, chunk, shift, prefix, first, _, tile, *_ = np.moveaxis(columns, 1, 0)
    p = first + np.arange(LANES)[:, None] + offset
    j = tile + np.arange(TILE)
    sees = (left == UNBOUNDED) | (j >= p - left)
    sees &= (right == UNBOUNDED) | (j <= p + right)
    size = np.maximum(chunk, 1)
    sees &= (chunk == 0) | ((j + shift) // size == (p + shift) // size)
    sees |= j < prefix
    return sees


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
    answers = ask(questions)
    for n in range(0, len(questions), 1024):  # 3 MB for each array of answers to all
        check_some(questions[n : n + 1024], answers[n : n + 1024])


def check_some(questions: list[Question], answers: Array) -> None:
    def must(fine: Array, what: str) -> None:
        """Each question's part of `fine` is true."""
        wrong = np.flatnonzero(~fine.reshape(len(questions), -1).all(1))
        assert not wrong.size, f"{what}: {questions[wrong[0]]}; {wrong.size} of {len(questions)}"

    given = np.array(questions, np.int64)
    exact = np.array([question.exact for question in questions])
    asked = np.arange(LANES)[:, None] < given[:, 8, None, None]  # queries of the block
    there = np.arange(TILE) < given[:, 10, None, None]  # keys of the tile
    sees = shown(given)
    for way in ("by_row", "by_lane"):
        must(answers[way].astype(bool) == (sees & there), way)
    must((answers["by_key"].astype(bool) == sees) | ~asked | ~there, "by_key")
    some = (sees & asked & there).any(1)
    all_ = (sees | ~asked).all(1) & there[:, 0]
    must(answers["touches"] >= some.any(1), "touches")
    covered = (sees | ~asked | ~there).all((1, 2))
    must(np.where(exact, answers["covers"] == covered, answers["covers"] <= covered), "covers")
    must((answers["by_seer"].astype(bool) == sees) | ~asked | ~there, "by_seer")
    must(answers["seers_touch"] >= some.any(1), "seers_touch")
    by_seers = answers["seers_cover"]
    must(np.where(exact, by_seers == covered, by_seers <= covered), "seers_cover")
    check_seers(given, exact, (sees & asked & there).any(2), answers["seers_some"], must)
    begin, end = first_and_end(some)
    seen = some.any(1)
    for name, bounds in (("some", answers["some"]), ("span", answers["span"] - given[:, 9, None])):
        must(~seen | (bounds[:, 0] <= begin) & (end <= bounds[:, 1]), name)
    same = (answers["some"] == np.stack([begin, end], 1)).all(1)
    empty = answers["some"][:, 0] >= answers["some"][:, 1]
    must(~exact | np.where(seen, same, empty) & (runs(some) <= 2), "some")
    longest = run_lengths(all_)
    end = TILE - longest[:, ::-1].argmax(1)  # of the last one, where two ranges are as long
    same = (answers["all"] == np.stack([end - longest.max(1), end], 1)).all(1)
    empty = answers["all"][:, 0] >= answers["all"][:, 1]
    must(np.where(all_.any(1), same, empty) & (runs(all_) <= 2), "all")


def check_seers(
    given: Array, exact: Array, seers: Array, found: Array, must: Callable[[Array, str], None]
) -> None:
    """Bounds of the queries that see a key of the tile: none outside, where the block is all."""
    begin = given[:, 7] + seers.argmax(1)
    end = given[:, 7] + LANES - seers[:, ::-1].argmax(1)
    seen = seers.any(1)
    must(~seen | (found[:, 0] <= begin) & (end <= found[:, 1]), "seers_some")
    whole = exact & (given[:, 7] == 0) & ((given[:, 11] == 0) | (given[:, 11] == given[:, 8]))
    must(~seen | ~whole | (found[:, 0] == begin) & (found[:, 1] == end), "seers_some of all")


def first_and_end(keys: Array) -> tuple[Array, Array]:
    """Of each row, the first true element and the place after the last one."""
    return keys.argmax(1), TILE - keys[:, ::-1].argmax(1)


def run_lengths(keys: Array) -> Array:
    """For each element, how many elements up to it are true without a gap."""
    place = np.arange(TILE)
    return place - np.maximum.accumulate(np.where(keys, -1, place), axis=1)


def runs(keys: Array) -> Array:
    """How many ranges of each row are true."""
    return (run_lengths(keys) == 1).sum(1)


def tiles(length: int, keys: int) -> list[tuple[int, int]]:
    return [(tile, min(keys, length - tile)) for tile in range(0, length, keys)]


# Every run takes one question of 7, from all over the sweep; slow, all of them.
STEP = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@STEP
def test_one_query_and_many_agree_on_a_dense_sweep(ask: Ask, step: int) -> None:
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
    check(ask, questions[::step])


NEAR_BOUNDS = [
    (UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (5, 3), (LARGEST - 1,) * 2, (2**30, 9),
    (-(2**30), LARGEST - 1), (LARGEST - 1, -(2**30)), (-LARGEST, UNBOUNDED), (UNBOUNDED, -LARGEST),
]  # fmt: skip


@STEP
def test_bounds_near_the_largest_length(ask: Ask, step: int) -> None:
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
                        Question(
                            seqlen_kv, offset, left, right, *chunk, prefix, *block, keys, seqlen_q
                        )
                        for prefix in {0, min(50, seqlen_kv), seqlen_kv}
                        for left, right in NEAR_BOUNDS
                        for chunk in [(0, 0), (1, 0), (10, 3), (2**30, 9), (LARGEST, LARGEST - 1)]
                    ]
    check(ask, questions[::step])


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
