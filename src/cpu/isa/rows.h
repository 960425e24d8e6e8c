// Where the rows of an operand are: sequences may begin anywhere in a batch, and keys may lie in
// pages.
#pragma once

#include "cpu/isa/kernels.h"
#include "shared/pages.h"

namespace umfa::cpu {
namespace {

/// Row of query, out: of one sequence and head.
template <class storage>
inline storage* query_row(const Rows& rows, const Sequence& sequence, int64_t head, int64_t row) {
    return static_cast<storage*>(rows.data) + sequence.query_batch * rows.stride_batch +
           head * rows.stride_head + (sequence.query_row + row) * rows.stride_row;
}

/// Position of a query, for rotary angles.
inline int64_t position_of(const ForwardArgs& args, const Sequence& sequence, int64_t row) {
    return sequence.position_q + (args.rotary.advances ? row : 0);
}

/// Where a key's row lies.
struct KeyPlace {
    int64_t batch, row;
};

inline KeyPlace key_place(const Sequence& sequence, int64_t page_size, int64_t key) {
    KeyPlace place{sequence.kv_batch, sequence.kv_row + key};
    if (sequence.pages) {
        const PageRow<int64_t> at = page_row(place.row, page_size);
        place = {sequence.pages[at.page], at.row};
    }
    return place;
}

/// Row of key or value. Called for a tile's keys one by one: a page may hold any number of them.
template <class storage>
inline storage* key_row(const Rows& rows, const Sequence& sequence, int64_t page_size, int64_t head,
                        int64_t key) {
    const KeyPlace at = key_place(sequence, page_size, key);
    return static_cast<storage*>(rows.data) + at.batch * rows.stride_batch +
           head * rows.stride_head + at.row * rows.stride_row;
}

/// Prefetches a row into the L2 cache: a tile ahead is too early for L1 (10 instead of 21 GB/s on
/// Zen 4). Always inlined, because GCC 12 takes a function that only prefetches for one without
/// effect.
template <class storage>
inline __attribute__((always_inline)) void prefetch_row(const storage* row, const Rows& layout,
                                                        int64_t channels) {
    if (layout.stride_channel != 1) return;
    constexpr int64_t line = 64 / sizeof(storage);
    for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(row + c, 0, 2);
}

}  // namespace
}  // namespace umfa::cpu
