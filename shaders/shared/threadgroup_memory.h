// What kernels keep in threadgroup memory, in numbers of elements: the shaders declare arrays of so
// many, and the planner adds up their bytes.
#pragma once

namespace umfa {

/// Elements from one row of a tile to the next: 16 bytes of padding, so that the rows of a fragment
/// lie in different banks.
constexpr int tile_row(int columns, int element_bytes) { return columns + 16 / element_bytes; }

/// Words of 16 bytes that a tile takes; declared in these, it is aligned for them.
constexpr int tile_words(int rows, int columns, int element_bytes) {
    return rows * tile_row(columns, element_bytes) * element_bytes / 16;
}

/// Words that hold two bits for each of `fragments` (values.h).
constexpr int flag_words(int fragments) { return (fragments + 15) / 16; }

// An array that a shape does not need has one element.

/// Words of 16 bytes of a kernel's second tile, unless it takes the place of the first.
constexpr int second_tile_words(int rows, int columns, bool one_tile, int element_bytes) {
    return one_tile ? 1 : tile_words(rows, columns, element_bytes);
}

// The forward kernel, for its template parameters.

/// Pairs of partial scores, where simdgroups share the channels.
constexpr int forward_parts(int bk, int qf, int simdgroups, int split) {
    return split > 1 ? simdgroups * qf * (bk / 8) * 32 : 1;
}
/// Words of flags of each of the two passes that count (values.h), of one thread.
constexpr int forward_flags(int dv, int qf, int split) { return flag_words(qf * (dv / split / 8)); }
/// Numbers kept for later passes: one, in whole 16 bytes.
constexpr int forward_first_tile() { return 4; }

constexpr int forward_bytes(int d, int dv, int bk, int qf, int simdgroups, int split, bool one_tile,
                            int element_bytes) {
    return 16 * tile_words(bk, d, element_bytes) +
           16 * second_tile_words(bk, dv, one_tile, element_bytes) +
           8 * forward_parts(bk, qf, simdgroups, split) +
           4 * (simdgroups + 2 * forward_flags(dv, qf, split) * 32 * simdgroups +
                forward_first_tile());
}

// The kernels of the backward pass: a tile of K and one of V, or of Q and of dO with the statistics of
// their rows. With ONE_TILE the second takes the place of the first.

/// Pairs of partial S and dP, where simdgroups share the channels.
constexpr int backward_parts(int block, int rows, int simdgroups, int split) {
    return split > 1 ? 2 * simdgroups * rows * (block / 8) * 32 : 1;
}

/// Words of 16 bytes of the tile of K, or of Q: when it is done with, eight rows of dQ or dK are rotated
/// back there as float32.
constexpr int rotated_back_words(int block, int d, int element_bytes) {
    return tile_words(block, d, element_bytes) > 2 * d ? tile_words(block, d, element_bytes)
                                                       : 2 * d;
}

constexpr int dmask_bytes(int d, int dv, int block, int rows, int simdgroups, int split,
                          bool one_tile, int element_bytes) {
    return 16 * tile_words(block, d, element_bytes) +
           16 * second_tile_words(block, dv, one_tile, element_bytes) +
           8 * backward_parts(block, rows, simdgroups, split);
}
constexpr int dq_bytes(int d, int dv, int block, int rows, int simdgroups, int split, bool one_tile,
                       int element_bytes) {
    return dmask_bytes(d, dv, block, rows, simdgroups, split, one_tile, element_bytes) +
           4 * simdgroups +
           16 * (rotated_back_words(block, d, element_bytes) - tile_words(block, d, element_bytes));
}
constexpr int dkv_bytes(int d, int dv, int block, int rows, int simdgroups, int split,
                        bool one_tile, int element_bytes) {
    return dq_bytes(d, dv, block, rows, simdgroups, split, one_tile, element_bytes) + 8 * block;
}

// The decode kernel.

/// Pairs of O of half of the simdgroups, while they merge.
constexpr int decode_merged_out(int dv, int qf, int simdgroups) {
    return simdgroups / 2 * qf * (dv / 8) * 32;
}
/// And of their softmax states.
constexpr int decode_merged_state(int qf, int simdgroups) { return simdgroups / 2 * qf * 32; }
/// Whether Q stays in registers, where it leaves room for O; else it is in threadgroup memory.
constexpr bool decode_q_stays(int d, int element_bytes) { return d * element_bytes <= 512; }
/// Pairs of Q.
constexpr int decode_parked_q(int d, int qf, int element_bytes) {
    return decode_q_stays(d, element_bytes) ? 1 : qf * (d / 8) * 32;
}
/// As forward_flags.
constexpr int decode_flags(int dv, int qf) { return flag_words(qf * (dv / 8)); }

constexpr int decode_bytes(int d, int dv, int qf, int simdgroups, int element_bytes) {
    return 8 * (decode_merged_out(dv, qf, simdgroups) + decode_merged_state(qf, simdgroups) +
                decode_parked_q(d, qf, element_bytes)) +
           4 * (2 * decode_flags(dv, qf) * 32 * simdgroups + simdgroups);
}

// The kernel for a single row.

/// Runs of 8 keys that a simdgroup has on their way at once: 64 registers a lane, and at most four.
constexpr int vector_runs(int d, int element_bytes) {
    return d * element_bytes <= 128 ? 4 : d * element_bytes <= 256 ? 2 : 1;
}

constexpr int vector_bytes(int dv, int simdgroups) { return 4 * simdgroups * dv + 8 * simdgroups; }

/// Floats that the simdgroups of a merge hand over, beside a sum each.
constexpr int merge_parts(int simdgroups, int per_lane) { return simdgroups * per_lane * 32; }

constexpr int merge_bytes(int simdgroups, int per_lane) {
    return 4 * (merge_parts(simdgroups, per_lane) + simdgroups);
}

}  // namespace umfa
