// What the decode kernels share: how a lane reads its part of a row of K and V, and what a score
// becomes.
#pragma once

#include <metal_stdlib>

#include "shared/code_rows.h"
#include "shared/constants.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/scores.h"
#include "shared/sequence.h"
#include "shared/values.h"
#include "shared/visible.h"

using namespace metal;

namespace umfa {

/// How a lane's `per_lane` channels of a row are cut into chunks of up to 16 bytes; `lanes` lanes
/// hold the row. Chunk i of lane n starts at channel (i * lanes + n) * chunk.
template <typename T>
constexpr int chunk_of(int per_lane) {
    return per_lane % (16 / int(sizeof(T))) == 0  ? 16 / int(sizeof(T))
           : per_lane % (8 / int(sizeof(T))) == 0 ? 8 / int(sizeof(T))
                                                  : 4 / int(sizeof(T));
}

/// The same of an operand that may hold codes. `packed`: key_codes or value_codes.
template <typename T>
inline int chunk_of(int per_lane, int packed) {
    return packed != 0 ? code_chunk(per_lane) : chunk_of<T>(per_lane);
}

/// Channel that fragment d of Q and K, or of a row of V, has in its row or column `place` (0 to 7).
template <typename T, int D>
inline int channel_of(int d, int place, int packed) {
    const int chunk = chunk_of<T>(D / 8, packed);
    return (d / chunk * 8 + place) * chunk + d % chunk;
}

/// A lane's elements of row `row` of the run at `k0`, chunk by chunk; zeros past the last channel. Past
/// the last row of `row_count` these are the last row's: its weight there is 0.
template <int CHUNK, int LANES, int PER_LANE, typename M, typename T>
inline void load_chunks(thread M (&elements)[PER_LANE], device const T* rows,
                        constant OperandStrides& strides, Pages pages, int k0, int row,
                        int row_count, int lane, int columns) {
    pages.first += k0;
    rows = tile_rows(rows, strides, k0);
    device const T* at = key_row(rows, strides, pages, min(row, row_count - 1));
#pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE / CHUNK; ++i) {
        M chunk[CHUNK];
        load_elements<CHUNK>(chunk, at, strides, true, (i * LANES + lane) * CHUNK, columns);
#pragma clang loop unroll(full)
        for (int e = 0; e < CHUNK; ++e) elements[i * CHUNK + e] = chunk[e];
    }
}

/// load_chunks() for the dtype that `kind` gives, in chunks of the kernel's own type.
template <typename T, int LANES, int PER_LANE, typename M>
inline void load_any_chunks(thread M (&elements)[PER_LANE], device const uchar* rows, int kind,
                            constant OperandStrides& strides, thread const Pages& pages, int k0,
                            int row, int row_count, int lane, int columns) {
    constexpr int CHUNK = chunk_of<T>(PER_LANE);
    if (kind == UMFA_MASK_F16)
        load_chunks<CHUNK, LANES>(elements,
                                  reinterpret_cast<device const typename Narrow<T>::Half*>(rows),
                                  strides, pages, k0, row, row_count, lane, columns);
    else if (kind == UMFA_MASK_BF16)
        load_chunks<CHUNK, LANES>(elements,
                                  reinterpret_cast<device const typename Narrow<T>::Bfloat*>(rows),
                                  strides, pages, k0, row, row_count, lane, columns);
    else
        load_chunks<CHUNK, LANES>(elements, reinterpret_cast<device const T*>(rows), strides, pages,
                                  k0, row, row_count, lane, columns);
}

/// load_any_chunks(), or where the operand is quantised load_code_chunks().
template <typename T, int LANES, int PER_LANE, typename M>
UMFA_INLINE void load_row(thread M (&elements)[PER_LANE], device const uchar* rows, int kind,
                          int packed, thread const Codes& codes, constant OperandStrides& strides,
                          thread const Pages& pages, int k0, int row, int row_count, int lane,
                          int columns) {
    const CodeKind code_kind_of = unpacked_kind(packed);
    if (packed == 0)
        load_any_chunks<T, LANES>(elements, rows, kind, strides, pages, k0, row, row_count, lane,
                                  columns);
    else if (bits_of_codes(code_kind_of.codes) == 8)
        load_code_chunks<8, T, LANES>(elements, rows, strides, codes, code_kind_of, pages, k0, row,
                                      row_count, lane, columns);
    else
        load_code_chunks<4, T, LANES>(elements, rows, strides, codes, code_kind_of, pages, k0, row,
                                      row_count, lane, columns);
}

/// Whether several threadgroups share a row's keys, so that what one finds is only a part. No constant
/// says so, as it changes with the number of keys while a cache grows.
inline bool is_split(constant DecodeParams& params) { return params.splits > 1; }

/// Where a sequence's first run of keys begins: dropout decides about aligned ones.
inline int first_key_of(int first_visible) {
    return has_dropout ? first_visible / 8 * 8 : first_visible;
}

/// A lane's scores of one row with all that depends on positions, and `lowest` for hidden keys.
/// `mixed`: among the keys are some that some row must not see.
template <bool GUARDED>
UMFA_INLINE float2 mask_tile(float2 x, thread const ScoreRow& row, int column, bool mixed, int end,
                             int pass, Visible<int> range, constant ForwardParams& params,
                             device const uchar* mask) {
    x.x = biased(x.x, row, column, params.score_scale, params);
    x.y = biased(x.y, row, column + 1, params.score_scale, params);
    if (has_mask)
        x = masked(x, mask_bits(mask, row.mask, column, range.seqlen_kv, params), params.mask_unit);
    if (mixed) {
        VisibleRow seen = whole_row(range, row.row);
        seen.end = min(seen.end, end);
        seen.prefix = has_prefix ? min(seen.prefix, end) : 0;
        if (!sees(seen, column)) x.x = lowest;
        if (!sees(seen, column + 1)) x.y = lowest;
    }
    return GUARDED && counts(pass) ? seen_scores(x) : x;
}

}  // namespace umfa
