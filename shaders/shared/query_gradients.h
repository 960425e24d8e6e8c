// What the kernels of the backward pass share whose rows are queries.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/dropout.h"
#include "shared/fragment.h"
#include "shared/gradients.h"
#include "shared/kinds.h"
#include "shared/params.h"
#include "shared/scores.h"
#include "shared/sequence.h"
#include "shared/tile.h"
#include "shared/values.h"
#include "shared/visible.h"

using namespace metal;

namespace umfa {

/// Zeros.
template <int ROWS, int DF>
UMFA_INLINE void clear(thread Fragment<float> (&x)[ROWS][DF]) {
#pragma clang loop unroll(full)
    for (int i = 0; i < ROWS * DF; ++i) set(x[i / DF][i % DF], 0.0f, 0.0f);
}

/// stage_any() of rows that lie in no pages. `from`: row 0 of the sequence and head.
template <typename E, typename T, int D, int TILE, int THREADS>
inline void stage_rows(threadgroup E* staged, device const uchar* from, int kind,
                       constant OperandStrides& strides, int first, int rows, int columns,
                       ushort thread_index) {
    const Pages none = {nullptr, 0, 0};
    from = first_rows<T, D, TILE, THREADS>(from, kind, strides, first, columns, thread_index);
    stage_any<E, T, D, TILE, THREADS>(staged, from, kind, strides, none, first, rows - first,
                                      columns, thread_index);
}

/// stage_rows() in the place of a tile that all threads have read, for all threads to read.
/// `guard_pass`: guard_rows()'s `pass`; 0 leaves the rows as they are.
template <typename E, typename T, int D, int TILE, int THREADS>
inline void restage_rows(threadgroup E* staged, device const uchar* from, int kind,
                         constant OperandStrides& strides, int first, int rows, int columns,
                         int guard_pass, ushort thread_index) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage_rows<E, T, D, TILE, THREADS>(staged, from, kind, strides, first, rows, columns,
                                       thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (guard_pass == 0) return;
    guard_rows<TILE, D, tile_row<E>(D), THREADS>(staged, guard_pass, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

/// First row of a tensor of queries, of the sequence and head.
template <typename T>
inline device const uchar* first_query(device const uchar* from, int kind,
                                       constant OperandStrides& strides,
                                       thread const SequenceParams& sequence, int head) {
    return moved<T>(from, kind,
                    sequence.query_batch * strides.batch + sequence.query_row * strides.row +
                        head * strides.head);
}

/// And elements before those of their statistics.
inline int64_t statistics_before(constant OperandStrides& strides,
                                 thread const SequenceParams& sequence, int head) {
    return sequence.query_batch * strides.batch + sequence.query_row * strides.row +
           head * strides.head;
}

/// dS of one row of queries in a tile of keys. `mixed`: the tile holds keys that the row must not see.
/// OF_MASK: it is wanted as the softmax has the scores; else as softcap gets them, but for the scale.
/// `slope`: where wanted, the lane's share of what an ALiBi slope gets from the row, of opposite sign,
/// is added to it.
template <bool OF_MASK, int ROWS, int KF, typename G>
UMFA_INLINE void query_gradients(thread Fragment<G> (&ds)[ROWS][KF],
                                 thread Fragment<float> (&s)[ROWS][KF],
                                 thread Fragment<float> (&dp)[ROWS][KF], int f,
                                 thread const ScoreRow& row, float2 statistics, int batch, int head,
                                 int k0, bool mixed, Visible<int> range, float unit,
                                 constant ForwardParams& params, device const uchar* mask,
                                 thread float& slope, LaneMap at) {
    VisibleRow seen = {0, 0, 0};
    if (mixed) seen = whole_row(range, row.row);
    Philox words;
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        const int column = k0 + j * 8 + at.column;
        float2 x = pair_of(s[f][j]), d = pair_of(dp[f][j]);
        float first_slope = 1.0f, second_slope = 1.0f;
        x.x = biased_with_slope(x.x, row, column, params, first_slope);
        x.y = biased_with_slope(x.y, row, column + 1, params, second_slope);
        if (has_mask)
            x = masked(x, mask_bits(mask, row.mask, column, range.seqlen_kv, params),
                       params.mask_unit);
        if (mixed) {
            x.x = sees(seen, column) ? x.x : lowest;
            x.y = sees(seen, column + 1) ? x.y : lowest;
        }
        if (has_dropout) {
            float first = d.x, second = d.y;
            if (KF == 1 || j % 2 == 0)
                words = words_of(params.dropout, batch, head, row.row, column);
            drop(first, second, words, KF == 1 ? column / 8 % 2 != 0 : j % 2 != 0,
                 params.dropout.threshold);
            d = float2(first, second) * params.dropout.factor;
        }
        const float2 p = float2(probability(x.x, unit, statistics.x, mixed),
                                probability(x.y, unit, statistics.x, mixed));
        float2 g = float2(times_unless_zero(p.x, d.x - statistics.y),
                          times_unless_zero(p.y, d.y - statistics.y));
        if (wants_dslopes)
            slope += g.x * abs(float(row.diagonal - column)) +
                     g.y * abs(float(row.diagonal - column - 1));
        if (has_softcap && !OF_MASK) g *= float2(first_slope, second_slope);
        set(ds[f][j], G(g.x), G(g.y));
    }
}

}  // namespace umfa
