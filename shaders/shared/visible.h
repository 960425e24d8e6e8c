// Which keys a query sees: causal alignment, sliding window and chunks, in one place for every
// kernel.
//
// Kernels call these functions and compute no bounds themselves:
//   next_tile     which tiles of keys a block of queries reads
//   seen_by_some  keys of a tile outside which no query of the block sees any
//   seen_by_all   keys of a tile that each query of the block sees
//   visible_row or whole_row, sees   whether a query sees a key
// or, with fewer operations a tile, seen_bounds, touches and covers; span_begin and span_end bound
// the keys where no tile is left out.
// Kernels whose blocks are keys ask the other way round, which queries see a key, by the same
// functions about seers(): seer_bounds, seer_row.
// Kernels rely on no more than that: inside seen_by_some and outside seen_by_all, only `sees`
// tells. So another rule, also one under which a query sees several ranges of keys, is added here
// alone.
//
// Included by the shaders (MSL, C++14 subset) and by the host: arguments by value only, no library
// calls. `Int` is int on the GPU and int64_t on the host. Lengths and positions are at most
// INT32_MAX, and no result or intermediate leaves the range of int.
#pragma once

#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

// Always inlined: on the host this header is compiled once per instruction set, and a shared
// out-of-line copy could hold instructions that the running CPU lacks.
#define UMFA_INLINE inline __attribute__((always_inline))

namespace umfa {

/// A left or right that bounds nothing: the largest int. No sequence is longer.
#define UMFA_UNBOUNDED 0x7fffffff

/// Query i sees the keys j with  i + offset - left <= j <= i + offset + right.
/// A negative left or right moves the window's edge across i + offset. With a chunk > 0 only the keys
/// of its own chunk: those whose position, with chunk_offset added, has the same quotient by it,
/// rounded down, as i + offset. 0 <= chunk_offset < chunk. Every query also sees the keys
/// j < prefix <= seqlen_kv.
template <typename Int>
struct Visible {
    Int seqlen_kv;
    Int offset;  // seqlen_kv - seqlen_q: bottom-right aligned (flash-attn, MLX); 0: top-left (torch)
    Int left;
    Int right;
    Int chunk;
    Int chunk_offset;
    Int prefix;
};

#ifndef __METAL_VERSION__

/// v with this window. Where it ends before it begins no query sees a key; an end that lies before
/// all keys lets a block of queries know it too.
UMFA_INLINE Visible<int64_t> with_window(Visible<int64_t> v, int64_t left, int64_t right) {
    const bool bounded = left != UMFA_UNBOUNDED && right != UMFA_UNBOUNDED;
    v.left = left;
    v.right = bounded && left + right < 0 ? -UMFA_UNBOUNDED : right;
    return v;
}

#endif

// ---- the bounds of one query -------------------------------------------------------------------

/// How many positions of its chunk come before `center`.
template <typename Int>
UMFA_INLINE Int place_in_chunk(Visible<Int> v, Int center) {
    const Int rest = center % v.chunk, place = rest < 0 ? rest + v.chunk : rest;
    const Int room = v.chunk - v.chunk_offset;  // compared before adding, so nothing wraps
    return place >= room ? place - room : place + v.chunk_offset;
}

/// First key that query i sees behind the prefix or in it, by the other rules, in [0, seqlen_kv].
template <typename Int>
UMFA_INLINE Int visible_begin(Visible<Int> v, Int i) {
    const Int center = i + v.offset;
    Int begin = 0;
    // A window reaching left of key 0 is common: compare before subtracting, so nothing wraps.
    if (v.left != UMFA_UNBOUNDED && center > v.left) {
        const bool past_end = v.left < 0 && center > v.seqlen_kv + v.left;
        begin = past_end ? v.seqlen_kv : center - v.left;
    }
    if (v.chunk > 0) {
        const Int place = place_in_chunk(v, center);
        if (center > place && center - place > begin) begin = center - place;
    }
    return begin < v.seqlen_kv ? begin : v.seqlen_kv;
}

/// One past the last such key, in [0, seqlen_kv]. There is none when end <= begin.
template <typename Int>
UMFA_INLINE Int visible_end(Visible<Int> v, Int i) {
    const Int center = i + v.offset;
    Int end = v.seqlen_kv;
    if (v.right != UMFA_UNBOUNDED && v.right < v.seqlen_kv - center)
        end = v.right < -center ? 0 : center + v.right + 1;
    if (v.chunk > 0) {
        const Int rest = v.chunk - place_in_chunk(v, center);
        if (rest < end - center) end = center + rest;
    }
    return end > 0 ? end : 0;
}

// ---- a block of queries and a tile of keys -----------------------------------------------------
// Neither bound decreases from one query to the next: the first and last query bound a block. The
// prefix is the same for all queries.

/// Keys [begin, end) of a tile, counted from its first key. Empty when end <= begin.
struct KeyRange {
    int begin, end;
};

template <typename Int>
UMFA_INLINE int clamp_key(Int key, Int keys) {
    return static_cast<int>(key < 0 ? 0 : key > keys ? keys : key);
}

/// A range with every key of the tile [first_key, first_key + keys) that some query of [first, last]
/// sees; the smallest one, unless a window of negative bounds meets chunks.
template <typename Int>
UMFA_INLINE KeyRange seen_by_some(Visible<Int> v, Int first, Int last, Int first_key, Int keys) {
    const int prefix = clamp_key(v.prefix - first_key, keys);
    const int begin = clamp_key(visible_begin(v, first) - first_key, keys);
    const int end = clamp_key(visible_end(v, last) - first_key, keys);
    if (begin >= end) return {0, prefix};
    return {prefix > 0 ? 0 : begin, end > prefix ? end : prefix};
}

/// Keys of the tile that each query of [first, last] sees: where they are two ranges, the longer one.
template <typename Int>
UMFA_INLINE KeyRange seen_by_all(Visible<Int> v, Int first, Int last, Int first_key, Int keys) {
    const int prefix = clamp_key(v.prefix - first_key, keys);
    const int begin = clamp_key(visible_begin(v, last) - first_key, keys);
    const int end = clamp_key(visible_end(v, first) - first_key, keys);
    if (begin >= end) return {0, prefix};
    if (begin <= prefix) return {prefix > 0 ? 0 : begin, end > prefix ? end : prefix};
    return prefix > end - begin ? KeyRange{0, prefix} : KeyRange{begin, end};
}

/// What a block of queries sees, for kernels that ask about one tile after the other.
template <typename Int>
struct SeenBounds {
    Int some_begin, some_end, all_begin, all_end, prefix;
};

template <typename Int>
UMFA_INLINE SeenBounds<Int> seen_bounds(Visible<Int> v, Int first, Int last) {
    return {visible_begin(v, first), visible_end(v, last), visible_begin(v, last),
            visible_end(v, first), v.prefix};
}

/// Whether some query of the block may see one of the keys [first_key, first_key + keys).
template <typename Int>
UMFA_INLINE bool touches(SeenBounds<Int> bounds, Int first_key, Int keys) {
    if (bounds.prefix > 0 && first_key < bounds.prefix) return true;
    return bounds.some_end > first_key && bounds.some_begin - keys < first_key;
}

/// Whether each query of the block sees all of the keys.
template <typename Int>
UMFA_INLINE bool covers(SeenBounds<Int> bounds, Int first_key, Int keys) {
    const bool ends = bounds.all_end - keys >= first_key;
    if (bounds.prefix > 0) {
        if (bounds.prefix - keys >= first_key) return true;
        if (first_key < bounds.prefix) first_key = bounds.prefix;
    }
    return ends && bounds.all_begin <= first_key;
}

/// Key before which queries from `first` on see none.
template <typename Int>
UMFA_INLINE Int span_begin(Visible<Int> v, Int first) {
    return v.prefix > 0 ? 0 : visible_begin(v, first);
}

/// Key from which on queries up to `last` see none.
template <typename Int>
UMFA_INLINE Int span_end(Visible<Int> v, Int last) {
    const Int end = visible_end(v, last);
    return end > v.prefix ? end : v.prefix;
}

/// Beginning of the first tile, at `from` or behind it, that the queries [first, last] have to
/// read; seqlen_kv when there is none. Tiles begin at multiples of `size`, and so does `from`.
template <typename Int>
UMFA_INLINE Int next_tile(Visible<Int> v, Int first, Int last, Int from, Int size) {
    if (from < v.prefix) return from;
    const Int begin = visible_begin(v, first), end = visible_end(v, last);
    const Int start = begin > from ? begin / size * size : from;
    return begin < end && start < end ? start : v.seqlen_kv;
}

/// next_tile() behind the tile at `start`, which they read. Without a prefix that is the next one, if
/// there are keys.
template <typename Int>
UMFA_INLINE Int tile_after(Visible<Int> v, Int first, Int last, Int start, Int size) {
    if (start >= v.seqlen_kv - size) return v.seqlen_kv;
    return v.prefix > 0 ? next_tile(v, first, last, start + size, size) : start + size;
}

// ---- single keys of a tile ---------------------------------------------------------------------

/// The keys of a tile that one query sees.
struct VisibleRow {
    int begin, end, prefix;
};

template <typename Int>
UMFA_INLINE VisibleRow visible_row(Visible<Int> v, Int i, Int first_key, Int keys) {
    return {clamp_key(visible_begin(v, i) - first_key, keys),
            clamp_key(visible_end(v, i) - first_key, keys), clamp_key(v.prefix - first_key, keys)};
}

/// All keys that one query sees, counted from key 0.
template <typename Int>
UMFA_INLINE VisibleRow whole_row(Visible<Int> v, Int i) {
    return {static_cast<int>(visible_begin(v, i)), static_cast<int>(visible_end(v, i)),
            static_cast<int>(v.prefix)};
}

/// Whether the query sees a key. Without a prefix, which constants may say, nothing asks for one.
UMFA_INLINE bool sees(VisibleRow row, int key) {
    return (key >= row.begin && key < row.end) || (row.prefix > 0 && key < row.prefix);
}

// ---- the other way round: which queries see a key ----------------------------------------------

/// The same rules read from the keys: key j is seen by the queries that "query" j of this sees as
/// "keys", if it does not lie in the prefix. A position p of the keys is the position p - offset of the
/// queries.
template <typename Int>
UMFA_INLINE Visible<Int> seers(Visible<Int> v, Int seqlen_q) {
    Visible<Int> by = {seqlen_q, -v.offset, v.right, v.left, v.chunk, 0, 0};
    // A query at index i has the place of center i + offset in its chunk.
    if (v.chunk > 0) by.chunk_offset = place_in_chunk(v, v.offset);
    return by;
}

/// Bounds of the queries that see keys of [first, last]: seen_bounds() of seers(). `prefix`: of v.
template <typename Int>
UMFA_INLINE SeenBounds<Int> seer_bounds(Visible<Int> by, Int prefix, Int first, Int last) {
    SeenBounds<Int> bounds = seen_bounds(by, first, last);
    if (first < prefix) {  // a key that all queries see
        bounds.some_begin = 0;
        bounds.some_end = by.seqlen_kv;
        bounds.all_begin = last < prefix ? 0 : visible_begin(by, last);
        bounds.all_end = last < prefix ? by.seqlen_kv : visible_end(by, prefix);
    }
    return bounds;
}

/// All queries that see one key, as whole_row() has the keys that one query sees.
template <typename Int>
UMFA_INLINE VisibleRow seer_row(Visible<Int> by, Int prefix, Int key) {
    if (key < prefix) return {0, static_cast<int>(by.seqlen_kv), 0};
    return whole_row(by, key);
}

#ifndef __METAL_VERSION__  // the CPU's vectors

/// The same for the GPU, whose integers have 32 bits.
inline Visible<int32_t> narrowed(Visible<int64_t> v) {
    return {int32_t(v.seqlen_kv), int32_t(v.offset),       int32_t(v.left),  int32_t(v.right),
            int32_t(v.chunk),     int32_t(v.chunk_offset), int32_t(v.prefix)};
}

/// Whether the query sees each of the keys, a vector of int: all bits are set where it does.
template <typename Vector>
UMFA_INLINE Vector sees(VisibleRow row, Vector keys) {
    return ((keys >= row.begin) & (keys < row.end)) | (keys < row.prefix);
}

/// The keys of a tile that each of N consecutive queries sees.
template <int N>
struct VisibleRows {
    int begin[N], end[N], prefix;
};

/// visible_row() of the queries from `first` on.
template <int N>
UMFA_INLINE void set_visible_rows(Visible<int64_t> v, int64_t first, int64_t first_key,
                                  int64_t keys, VisibleRows<N>& rows) {
    rows.prefix = clamp_key(v.prefix - first_key, keys);
    if (v.chunk > 0) {  // a division for each query
        for (int j = 0; j < N; ++j) {
            const VisibleRow row = visible_row(v, first + j, first_key, keys);
            rows.begin[j] = row.begin;
            rows.end[j] = row.end;
        }
        return;
    }
    // Both bounds move by one from query to query, and are clamped after that. The first query's
    // are clamped to where all N of them still come out right in 32 bits, which makes the loop
    // vectors.
    const int64_t center = first + v.offset - first_key;
    const auto near = [&](int64_t key) {
        return static_cast<int>(key < -N ? -N : key > keys ? keys : key);
    };
    const int count = static_cast<int>(keys);
    const int begin = v.left == UMFA_UNBOUNDED ? -N : near(center - v.left);
    const int end = v.right == UMFA_UNBOUNDED ? count : near(center + v.right + 1);
    for (int j = 0; j < N; ++j) {
        rows.begin[j] = clamp_key(begin + j, count);
        rows.end[j] = clamp_key(end + j, count);
    }
}

/// Whether each query, from `lane` on, as many as the vector has elements, sees the key.
template <typename Vector, int N>
UMFA_INLINE Vector sees(const VisibleRows<N>& rows, int lane, int key) {
    Vector begin, end;
    __builtin_memcpy(&begin, rows.begin + lane, sizeof begin);
    __builtin_memcpy(&end, rows.end + lane, sizeof end);
    const Vector keys = Vector{} + key;
    return ((keys >= begin) & (keys < end)) | (keys < rows.prefix);
}

#endif

}  // namespace umfa
