// From the scores of a tile to probabilities, and to the gradient of the scores.
//
// P is recomputed from the log-sum-exp L of its row, both in units of log2: P = 2^(S - L). With D =
// rowsum(dO * O) - dL, the gradient of the natural scores is dS = P * (dP - D), and where P is 0, so is
// dS, whatever dP: hidden keys may hold NaN.
//
// Kernels of half multiply P, as half, by dO. P is then 2^12 times as large, which leaves 16 times of
// room below 65504, and keeps eleven bits of probabilities down to 2^-26. dS stays float: with a loss
// that is multiplied by 2^16, as gradient scalers do, half would overflow, and with gradients near 2^-24
// vanish.
//
// NaN and infinities of rows that are hidden must not come in by dS K, dS^T Q and P^T dO, where 0 * NaN
// is NaN. As in values.h, kernels look at their result once, at the end, and if it is not finite and
// something was hidden, they compute it again: S and dP as before, but those three products with 0 in
// place of what is not finite. A row of K or Q that is seen has made the log-sum-exp NaN, and so dS. A
// row of dO that is seen is found by two more passes, which count it.
#pragma once

#include <metal_stdlib>

#include "shared/dropout.h"
#include "shared/fragment.h"
#include "shared/kinds.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/scores.h"
#include "shared/softmax.h"
#include "shared/staged.h"
#include "shared/values.h"
#include "shared/visible.h"

using namespace metal;

namespace umfa {

/// The type in which dS is multiplied, for kernels whose operands are M.
template <typename M>
struct ScoreGradient {
    using Type = M;
};
template <>
struct ScoreGradient<half> {
    using Type = float;
};

/// P of a score, `lowest` where it is hidden, which only `mixed` tiles and masks do. The log-sum-exp of a
/// row that sees NaN is NaN, but what is hidden from it stays 0. Only by rounding does a score exceed the
/// log-sum-exp; from scores of 1e9 on, that gave infinities. The bound is what P in half needs, where it is
/// 2^UMFA_HALF_RAISED times as large.
inline float probability(float x, float unit, float lse, bool mixed) {
    const float most = UMFA_HALF_RAISED;
    const float exponent = fma(x, unit, -lse);
    const float p = fast::exp2(exponent > most ? most : exponent);  // NaN passes
    return (mixed || has_mask) && x <= lowest ? 0.0f : p;
}

/// What is 0 stays 0 times anything. Compares bits, because fast math may turn the comparison and the
/// product into the product alone.
inline float times_unless_zero(float p, float x) {
    return (as_type<uint>(p) << 1) == 0u ? 0.0f : p * x;
}

/// x = q.k as biased() (scores.h) has it. `slope`: with softcap, the derivative of it.
inline float biased_with_slope(float x, thread const ScoreRow& row, int column,
                               constant ForwardParams& params, thread float& slope) {
    if (!scale_last) x *= params.score_scale;
    if (has_softcap) {
        const float t = precise::tanh(x);
        slope = 1.0f - t * t;
        x = params.softcap * t;
    }
    if (has_alibi) x -= row.slope * abs(float(row.diagonal - column));
    return x;
}

/// One element of the mask; for a bool mask, 1 if the key is visible, else 0.
inline float mask_at(device const uchar* mask, int64_t at) {
    if (mask_kind == UMFA_MASK_BOOL) return mask[at] != 0 ? 1.0f : 0.0f;
    return number_at(mask, mask_kind, at);
}

/// masked() (scores.h) where a row of the fragment is a key and its columns are queries: `row.mask` is
/// the offset of the key's column in the mask.
inline float2 masked_queries(float2 x, thread const ScoreRow& row, int column, int seqlen_q,
                             constant ForwardParams& params, device const uchar* mask) {
    const int last = seqlen_q - 1;
    const float first = mask_at(mask, row.mask + min(column, last) * params.mask_row);
    const float second = mask_at(mask, row.mask + min(column + 1, last) * params.mask_row);
    return float2(masked(x.x, first, params.mask_unit), masked(x.y, second, params.mask_unit));
}

/// score_row() (scores.h) of a key, whose columns are queries. `offset`: position of query 0.
inline ScoreRow score_row_of_key(constant ForwardParams& params, device const float* slopes,
                                 int batch, int head, int key, int seqlen_kv, int offset) {
    ScoreRow found;
    found.row = key;
    found.diagonal = key - offset;
    found.slope = 0.0f;
    found.mask = 0;
    if (has_alibi)
        found.slope = slopes[batch * params.slopes_batch + head * params.slopes_head] * log2_e;
    if (has_mask)
        found.mask = batch * params.mask_batch + head * params.mask_head +
                     min(key, seqlen_kv - 1) * params.mask_column;
    return found;
}

/// `from` advanced by `elements` of a gradient: of T, or of the dtype that `kind` gives.
template <typename T>
inline device uchar* moved_gradient(device uchar* from, int kind, int64_t elements) {
    if (kind == UMFA_MASK_F32)
        return reinterpret_cast<device uchar*>(reinterpret_cast<device float*>(from) + elements);
    return moved<T>(from, kind, elements);
}

template <typename T>
inline void store_gradient(device uchar* to, int kind, int64_t index, float x) {
    if (kind == UMFA_MASK_F32)
        reinterpret_cast<device float*>(to)[index] = x;
    else
        store_any<T>(to, kind, index, x);
}

template <typename T>
inline float load_gradient(device const uchar* from, int kind, int64_t index) {
    if (kind == UMFA_MASK_F32) return reinterpret_cast<device const float*>(from)[index];
    if (kind == UMFA_MASK_F16)
        return float(reinterpret_cast<device const typename Narrow<T>::Half*>(from)[index]);
    if (kind == UMFA_MASK_BF16)
        return float(reinterpret_cast<device const typename Narrow<T>::Bfloat*>(from)[index]);
    return float(reinterpret_cast<device const T*>(from)[index]);
}

/// Rows of a gradient that one simdgroup holds, times `factor`. `to`: row 0 of the sequence and head.
template <typename T, int ROWS, int DF>
UMFA_INLINE void store_gradient_rows(device uchar* to, int kind, constant OperandStrides& strides,
                                     thread Fragment<float> (&d)[ROWS][DF], int first, int rows,
                                     int part, int columns, float factor, LaneMap at) {
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = first + f * 8 + at.row;
        if (row >= rows) continue;
        device uchar* own = moved_gradient<T>(to, kind, row * strides.row);
#pragma clang loop unroll(full)
        for (int c = 0; c < DF; ++c) {
            const int column = (part * DF + c) * 8 + at.column;
            const float2 x = pair_of(d[f][c]) * factor;
            if (column < columns)
                store_gradient<T>(own, kind, column * channel_stride(strides), x.x);
            if (column + 1 < columns)
                store_gradient<T>(own, kind, (column + 1) * channel_stride(strides), x.y);
        }
    }
}

/// Adds infinities to the rows of a gradient where `counts` is not 0: in one pass +inf, then -inf.
template <typename T, int ROWS, int DF>
UMFA_INLINE void spoil_gradient_rows(device uchar* to, int kind, constant OperandStrides& strides,
                                     thread Fragment<float> (&counts)[ROWS][DF], int first,
                                     int rows, int part, int columns, bool up, LaneMap at) {
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = first + f * 8 + at.row;
        if (row >= rows) continue;
        device uchar* own = moved_gradient<T>(to, kind, row * strides.row);
#pragma clang loop unroll(full)
        for (int c = 0; c < DF; ++c) {
            const float2 count = pair_of(counts[f][c]);
#pragma clang loop unroll(full)
            for (int i = 0; i < 2; ++i) {
                const int column = (part * DF + c) * 8 + at.column + i;
                if (column >= columns || !((i == 0 ? count.x : count.y) > 0.0f)) continue;
                const int64_t index = column * channel_stride(strides);
                store_gradient<T>(own, kind, index,
                                  spoiled(load_gradient<T>(own, kind, index), up, !up));
            }
        }
    }
}

/// Whether a row of the threadgroup, of those before `rows`, holds NaN or an infinity. All threads get
/// the same answer.
template <int SIMDGROUPS, int ROWS, int DF>
UMFA_INLINE bool any_spoiled_rows(thread Fragment<float> (&x)[ROWS][DF], int first, int rows,
                                  threadgroup uint* votes, ushort thread_index, LaneMap at) {
    bool mine = false;
#pragma clang loop unroll(full)
    for (int i = 0; i < ROWS * DF; ++i)
        mine = mine || (first + i / DF * 8 + at.row < rows && is_spoiled(x[i / DF][i % DF]));
    const bool of_simdgroup = simd_any(mine);
    if (thread_index % 32 == 0) votes[thread_index / 32] = of_simdgroup ? 1u : 0u;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint any = 0u;
#pragma clang loop unroll(full)
    for (int i = 0; i < SIMDGROUPS; ++i) any |= votes[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before it votes again
    return any != 0u;
}

/// Rows of a tensor as fragments, zeros past the last, for products that sum over the channels. `from`:
/// row 0 of the sequence and head.
template <typename T, int ROWS, int DF, typename M>
UMFA_INLINE void load_rows(thread Fragment<M> (&x)[ROWS][DF], device const uchar* from, int kind,
                           constant OperandStrides& strides, int first, int rows, int part,
                           int columns, LaneMap at) {
    constexpr int APART = Staged<T, M>::APART;
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = first + f * 8 + at.row;
#pragma clang loop unroll(full)
        for (int d = 0; d < DF; ++d) {
            const int column = Staged<T, M>::channel(part * DF + d, at.column);
            set(x[f][d], any_element<M, T>(from, kind, strides, row, rows, column, columns),
                any_element<M, T>(from, kind, strides, row, rows, column + APART, columns));
        }
    }
}

}  // namespace umfa
