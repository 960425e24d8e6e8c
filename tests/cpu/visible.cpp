// Answers of shaders/shared/visible.h, for test_visible.py.
//
// Reads `Question`s from stdin. For each it writes, as int64: some.begin, some.end, all.begin,
// all.end, next_tile(from the tile), tile_after(the tile), the span, whether the block touches and
// covers the tile, then for each of `lanes` queries visible_begin and visible_end; then as bytes, for
// each query and each of `most_keys` keys of the tile, whether it is seen: by visible_row(), by
// VisibleRows, and for the block's queries by whole_row(). Keys past the tile's are never seen. Then the
// other way round, of the tile's keys and the block's queries: whether the keys' bounds touch and cover
// the block, and for each query and key whether seer_row() says so.
//
// "lanes" writes the two constants. Fails where int and int64_t differ.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "shared/visible.h"

namespace {

using namespace umfa;

constexpr int lanes = 32, most_keys = 96, width = 8;
typedef int Vector __attribute__((vector_size(4 * width)));

struct Question {
    int64_t seqlen_kv, offset, left, right, chunk, chunk_offset, prefix;
    int64_t first, queries;  // of a block; rows past it are computed, as kernels do
    int64_t tile, keys;
    int64_t seqlen_q;  // 0: the block ends it
};

struct Answer {
    int64_t some[2], all[2], next, after, span[2], touches, covers;
    int64_t bounds[lanes][2];
    unsigned char by_row[lanes][most_keys], by_lane[lanes][most_keys], by_key[lanes][most_keys];
    int64_t seers_touch, seers_cover, seers_some[2];
    unsigned char by_seer[lanes][most_keys];
};

template <class Int>
void block(const Question& q, Answer& answer) {
    const Visible<int64_t> window = with_window({}, q.left, q.right);
    const Visible<Int> v{static_cast<Int>(q.seqlen_kv), static_cast<Int>(q.offset),
                         static_cast<Int>(window.left), static_cast<Int>(window.right),
                         static_cast<Int>(q.chunk),     static_cast<Int>(q.chunk_offset),
                         static_cast<Int>(q.prefix)};
    const Int first = static_cast<Int>(q.first), last = static_cast<Int>(q.first + q.queries - 1);
    const Int tile = static_cast<Int>(q.tile), keys = static_cast<Int>(q.keys);
    const KeyRange some = seen_by_some(v, first, last, tile, keys);
    const KeyRange all = seen_by_all(v, first, last, tile, keys);
    answer.some[0] = some.begin, answer.some[1] = some.end;
    answer.all[0] = all.begin, answer.all[1] = all.end;
    answer.next = next_tile(v, first, last, tile, static_cast<Int>(most_keys));
    answer.after = tile_after(v, first, last, tile, static_cast<Int>(most_keys));
    answer.span[0] = span_begin(v, first), answer.span[1] = span_end(v, last);
    const SeenBounds<Int> bounds = seen_bounds(v, first, last);
    answer.touches = touches(bounds, tile, keys), answer.covers = covers(bounds, tile, keys);
    for (Int i = 0; i < static_cast<Int>(q.queries); ++i) {
        answer.bounds[i][0] = visible_begin(v, first + i);
        answer.bounds[i][1] = visible_end(v, first + i);
        const VisibleRow whole = whole_row(v, first + i);
        for (Int k = 0; k < keys; ++k)
            answer.by_key[i][k] = sees(whole, static_cast<int>(tile + k));
    }
}

/// The same block and tile, asked from the keys.
template <class Int>
void other_way_round(const Question& q, Answer& answer) {
    const int64_t seqlen_q = q.seqlen_q > 0 ? q.seqlen_q : q.first + q.queries;
    const Visible<int64_t> window = with_window({}, q.left, q.right);
    const Visible<Int> v{static_cast<Int>(q.seqlen_kv), static_cast<Int>(q.offset),
                         static_cast<Int>(window.left), static_cast<Int>(window.right),
                         static_cast<Int>(q.chunk),     static_cast<Int>(q.chunk_offset),
                         static_cast<Int>(q.prefix)};
    const Visible<Int> by = seers(v, static_cast<Int>(seqlen_q));
    const Int first = static_cast<Int>(q.tile), last = static_cast<Int>(q.tile + q.keys - 1);
    const Int query = static_cast<Int>(q.first), queries = static_cast<Int>(q.queries);
    const SeenBounds<Int> bounds = seer_bounds(by, v.prefix, first, last);
    answer.seers_touch = touches(bounds, query, queries);
    answer.seers_cover = covers(bounds, query, queries);
    answer.seers_some[0] = bounds.some_begin, answer.seers_some[1] = bounds.some_end;
    for (Int k = 0; k < static_cast<Int>(q.keys); ++k) {
        const VisibleRow row = seer_row(by, v.prefix, first + k);
        for (Int i = 0; i < queries; ++i)
            answer.by_seer[i][k] = sees(row, static_cast<int>(query + i));
    }
}

void rows(const Question& q, Answer& answer) {
    const Visible<int64_t> v = with_window(
        {q.seqlen_kv, q.offset, 0, 0, q.chunk, q.chunk_offset, q.prefix}, q.left, q.right);
    VisibleRows<lanes> together;
    set_visible_rows(v, q.first, q.tile, q.keys, together);
    Vector number;
    for (int i = 0; i < width; ++i) number[i] = i;
    for (int j = 0; j < lanes; ++j) {
        const VisibleRow row = visible_row(v, q.first + j, q.tile, q.keys);
        for (int k = 0; k < most_keys; k += width) {
            const Vector seen = sees(row, number + k);
            for (int i = 0; i < width; ++i) answer.by_row[j][k + i] = seen[i] != 0;
        }
    }
    for (int k = 0; k < most_keys; ++k)
        for (int j = 0; j < lanes; j += width) {
            const Vector seen = sees<Vector>(together, j, k);
            for (int i = 0; i < width; ++i) answer.by_lane[j + i][k] = seen[i] != 0;
        }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2 && !std::strcmp(argv[1], "lanes"))
        return std::printf("%d %d\n", lanes, most_keys) < 0;
    for (Question q; std::fread(&q, sizeof q, 1, stdin) == 1;) {
        Answer answer{}, on_gpu{};
        block<int64_t>(q, answer);
        block<int>(q, on_gpu);
        other_way_round<int64_t>(q, answer);
        other_way_round<int>(q, on_gpu);
        if (std::memcmp(&answer, &on_gpu, sizeof answer)) {
            std::fprintf(stderr, "int differs: seqlen_kv %lld, offset %lld, query %lld\n",
                         static_cast<long long>(q.seqlen_kv), static_cast<long long>(q.offset),
                         static_cast<long long>(q.first));
            return 3;
        }
        rows(q, answer);
        std::fwrite(&answer, sizeof answer, 1, stdout);
    }
    return 0;
}
