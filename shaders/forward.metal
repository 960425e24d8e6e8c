// Forward attention on simdgroup matrices: online softmax over key tiles (Milakov & Gimelshein 2018;
// Dao et al. 2022), in exp2 with log2(e) folded into the scale.
//
// One threadgroup owns BQ queries of one head; each of its simdgroups owns 8 * QF rows, keeps their
// Q, O, maximum and sum in registers, and never exchanges anything with the others. K and V tiles
// are staged in threadgroup memory once for all of them. A lane holds two adjacent columns of a
// row (fragment.h), for S and P alike, so P feeds P V without a move.
//
// Finite arithmetic only: under fast math Metal leaves infinities undefined. `lowest` stands for
// -inf, is never produced by a real score, and is compared, not computed with.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "umfa/fragment.h"
#include "umfa/params.h"
#include "umfa/visible.h"

using namespace metal;

constant bool has_lse [[function_constant(0)]];
constant int mask_kind [[function_constant(1)]];  // 0 none, 1 bool, 2 float, 3 half, 4 bfloat
constant bool has_mask [[function_constant(2)]];
constant bool has_alibi [[function_constant(3)]];
constant bool has_softcap [[function_constant(4)]];
// Scores are q.k alone, and the scale is positive: they are scaled after the maximum is taken off,
// so that their size costs no precision.
constant bool scale_last [[function_constant(5)]];
constant bool unit_channels [[function_constant(6)]];  // every channel stride is 1

namespace umfa {

constant constexpr float lowest = -1.7e38f;
constant constexpr float log2_e = 1.44269504f;

inline int64_t channel_stride(constant OperandStrides& strides) {
    return unit_channels ? 1 : strides.channel;
}

/// One element, zero past the last row and column: padding is never read, and 0 * NaN never reaches
/// P V.
template <typename M, typename T>
inline M element(device const T* rows, constant OperandStrides& strides, int row, int row_count,
                 int column, int columns) {
    return row < row_count && column < columns
               ? M(rows[row * strides.row + column * channel_stride(strides)])
               : M(0);
}

/// A lane's two elements of a fragment of Q.
template <typename M, typename T>
inline void load_query(thread Fragment<M>& fragment, device const T* query,
                       constant ForwardParams& params, int row, int column) {
    set(fragment, element<M>(query, params.query, row, params.seqlen_q, column, params.head_dim),
        element<M>(query, params.query, row, params.seqlen_q, column + 1, params.head_dim));
}

/// Copies a tile of BK rows into threadgroup memory, zeros past the last row and channel.
template <typename M, int D, int BK, int THREADS, int ROW, typename T>
inline void stage(threadgroup M* tile, device const T* rows, constant OperandStrides& strides,
                  int row_count, int columns, ushort thread_index) {
    for (int i = thread_index; i < BK * D; i += THREADS) {
        const int row = i / D, column = i % D;
        tile[row * ROW + column] = element<M>(rows, strides, row, row_count, column, columns);
    }
}

/// The additive mask at one place in units of log2, or `lowest` where the key must not be seen.
inline float mask_at(device const uchar* mask, int64_t at) {
    if (mask_kind == 1) return mask[at] != 0 ? 0.0f : lowest;
    float bias = 0.0f;
    if (mask_kind == 2) bias = reinterpret_cast<device const float*>(mask)[at];
    if (mask_kind == 3) bias = float(reinterpret_cast<device const half*>(mask)[at]);
    if (mask_kind == 4)
        bias = as_type<float>(uint(reinterpret_cast<device const ushort*>(mask)[at]) << 16);
    // -inf by its bits, since comparing with it may be folded away; other values may be as low as
    // the type goes, which times log2(e) would overflow.
    return as_type<uint>(bias) == 0xff800000u || bias < lowest / 2 ? lowest : bias * log2_e;
}

template <typename T, typename M, int D, int BK, int QF, int SIMDGROUPS>
[[kernel]] void forward(device const T* query [[buffer(0)]], device const T* key [[buffer(1)]],
                        device const T* value [[buffer(2)]], device T* out [[buffer(3)]],
                        device float* lse [[buffer(4), function_constant(has_lse)]],
                        device const uchar* mask [[buffer(5), function_constant(has_mask)]],
                        device const float* slopes [[buffer(6), function_constant(has_alibi)]],
                        constant ForwardParams& params [[buffer(7)]],
                        uint3 group [[threadgroup_position_in_grid]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]]) {
    constexpr int THREADS = 32 * SIMDGROUPS, BQ = 8 * QF * SIMDGROUPS;
    constexpr int ROW = D + 16 / sizeof(M);  // 16 bytes of padding: no bank conflicts down a column
    threadgroup M k_tile[BK * ROW];
    threadgroup M v_tile[BK * ROW];

    const LaneMap at = lane_map(lane);
    const ushort thread_index = simdgroup * 32 + lane;
    const int head = group.y, batch = group.z, head_kv = head / params.group;
    const int seqlen_q = params.seqlen_q, seqlen_kv = params.seqlen_kv;
    const int first_row = group.x * BQ, my_row = first_row + simdgroup * 8 * QF;

    query += batch * params.query.batch + head * params.query.head;
    key += batch * params.key.batch + head_kv * params.key.head;
    value += batch * params.value.batch + head_kv * params.value.head;
    out += batch * params.out.batch + head * params.out.head;

    // Q stays in registers where it leaves room for O; else each tile reads it again, from cache.
    constexpr bool q_stays = D * sizeof(M) <= 512;
    Fragment<M> q[QF][q_stays ? D / 8 : 1];
    Fragment<float> o[QF][D / 8];
    float maximum[QF], sum[QF];
#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        maximum[f] = lowest;
        sum[f] = 0.0f;
#pragma clang loop unroll(full)
        for (int d = 0; d < D / 8; ++d) {
            if (q_stays)
                load_query(q[f][d], query, params, my_row + f * 8 + at.row, d * 8 + at.column);
            set(o[f][d], 0.0f, 0.0f);
        }
    }

    float slope = 0.0f;
    if (has_alibi) slope = slopes[batch * params.slopes_batch + head * params.slopes_head] * log2_e;

    // Visible ranges grow with the query: the first and last rows bound the threadgroup, and the
    // first and last of a simdgroup tell whether a tile is hidden, whole or mixed for it.
    const Visible<int> visible = {seqlen_kv, params.offset, params.left, params.right};
    const int tiles_begin = visible_begin(visible, first_row) / BK * BK;
    const int tiles_end = visible_end(visible, min(first_row + BQ, seqlen_q) - 1);
    const int my_last = min(my_row + 8 * QF, seqlen_q) - 1;
    const int some_begin = visible_begin(visible, my_row), some_end = visible_end(visible, my_last);
    const int all_begin = visible_begin(visible, my_last), all_end = visible_end(visible, my_row);

    for (int k0 = tiles_begin; k0 < tiles_end; k0 += BK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage<M, D, BK, THREADS, ROW>(k_tile, key + k0 * params.key.row, params.key, seqlen_kv - k0,
                                      params.head_dim, thread_index);
        stage<M, D, BK, THREADS, ROW>(v_tile, value + k0 * params.value.row, params.value,
                                      seqlen_kv - k0, params.head_dim_v, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (my_row >= seqlen_q || some_end <= k0 || some_begin >= k0 + BK) continue;

        // S = Q K^T. B(channel, key) is K(key, channel): a lane's two columns are two keys.
        Fragment<float> s[QF][BK / 8];
#pragma clang loop unroll(full)
        for (int j = 0; j < BK / 8; ++j) {
#pragma clang loop unroll(full)
            for (int f = 0; f < QF; ++f) set(s[f][j], 0.0f, 0.0f);
            threadgroup const M* k_rows = k_tile + (j * 8 + at.column) * ROW + at.row;
#pragma clang loop unroll(full)
            for (int d = 0; d < D / 8; ++d) {
                Fragment<M> b;
                set(b, k_rows[d * 8], k_rows[d * 8 + ROW]);
#pragma clang loop unroll(full)
                for (int f = 0; f < QF; ++f) {
                    const int resident = q_stays ? d : 0;
                    if (!q_stays)
                        load_query(q[f][0], query, params, my_row + f * 8 + at.row,
                                   d * 8 + at.column);
                    simdgroup_multiply_accumulate(s[f][j], q[f][resident], b, s[f][j]);
                }
            }
        }

        const bool mixed = all_begin > k0 || all_end < k0 + BK;
        Fragment<M> p[QF][BK / 8];
#pragma clang loop unroll(full)
        for (int f = 0; f < QF; ++f) {
            const int row = my_row + f * 8 + at.row;
            const int begin = visible_begin(visible, row), end = visible_end(visible, row);
            float tile_max = maximum[f];
#pragma clang loop unroll(full)
            for (int j = 0; j < BK / 8; ++j) {
#pragma clang loop unroll(full)
                for (int e = 0; e < 2; ++e) {
                    const int column = k0 + j * 8 + at.column + e;
                    float x = s[f][j].thread_elements()[e];
                    if (!scale_last) x *= params.score_scale;
                    if (has_softcap) x = params.softcap * precise::tanh(x);
                    if (has_alibi) x -= slope * abs(float(row + seqlen_kv - seqlen_q - column));
                    if (mixed) x = column >= begin && column < end ? x : lowest;
                    if (has_mask && row < seqlen_q && column < seqlen_kv) {
                        const float bias =
                            mask_at(mask, batch * params.mask_batch + head * params.mask_head +
                                              row * params.mask_row + column * params.mask_column);
                        x = bias == lowest || x == lowest ? lowest : x + bias;
                    }
                    s[f][j].thread_elements()[e] = x;
                    tile_max = max(tile_max, x);
                }
            }
            tile_max = row_max(tile_max);
            const float unit = scale_last ? params.score_scale : 1.0f;
            // A row that has seen nothing yet: lowest times a small scale would not vanish.
            const float correction =
                maximum[f] > lowest ? fast::exp2((maximum[f] - tile_max) * unit) : 0.0f;
            maximum[f] = tile_max;
            float tile_sum = 0.0f;
#pragma clang loop unroll(full)
            for (int j = 0; j < BK / 8; ++j) {
                const float x0 = s[f][j].thread_elements()[0], x1 = s[f][j].thread_elements()[1];
                // In a row that has seen nothing yet, lowest - lowest would give 1. NaN passes.
                const float p0 = x0 <= lowest ? 0.0f : fast::exp2((x0 - tile_max) * unit);
                const float p1 = x1 <= lowest ? 0.0f : fast::exp2((x1 - tile_max) * unit);
                tile_sum += p0 + p1;
                set(p[f][j], M(p0), M(p1));
            }
            sum[f] = sum[f] * correction + row_sum(tile_sum);
#pragma clang loop unroll(full)
            for (int d = 0; d < D / 8; ++d)
                set(o[f][d], o[f][d].thread_elements()[0] * correction,
                    o[f][d].thread_elements()[1] * correction);
        }

        // O += P V
#pragma clang loop unroll(full)
        for (int j = 0; j < BK / 8; ++j) {
            threadgroup const M* v_rows = v_tile + (j * 8 + at.row) * ROW + at.column;
#pragma clang loop unroll(full)
            for (int d = 0; d < D / 8; ++d) {
                Fragment<M> b;
                set(b, v_rows[d * 8], v_rows[d * 8 + 1]);
#pragma clang loop unroll(full)
                for (int f = 0; f < QF; ++f)
                    simdgroup_multiply_accumulate(o[f][d], p[f][j], b, o[f][d]);
            }
        }
    }

#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        const int row = my_row + f * 8 + at.row;
        if (row >= seqlen_q) continue;
        const float inverse = sum[f] == 0.0f ? 0.0f : 1.0f / sum[f];
#pragma clang loop unroll(full)
        for (int d = 0; d < D / 8; ++d) {
#pragma clang loop unroll(full)
            for (int e = 0; e < 2; ++e) {
                const int column = d * 8 + at.column + e;
                if (column < params.head_dim_v)
                    out[row * params.out.row + column * channel_stride(params.out)] =
                        T(o[f][d].thread_elements()[e] * inverse);
            }
        }
        if (has_lse && at.column == 0)
            lse[batch * params.lse.batch + head * params.lse.head + row * params.lse.row] =
                sum[f] == 0.0f
                    ? as_type<float>(0xff800000u)  // -inf, as bits
                    : (maximum[f] * (scale_last ? params.score_scale : 1.0f) + log2(sum[f])) *
                          0.693147181f;
    }
}

}  // namespace umfa

#define UMFA_FORWARD(NAME, T, M, D, BK, QF, SIMDGROUPS)                                          \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa::forward<T, M, D, BK, QF, SIMDGROUPS>) \
        umfa::forward<T, M, D, BK, QF, SIMDGROUPS>;

#ifdef UMFA_KERNEL
// Compiled from text for one problem: the planner names the kernel and its shape.
UMFA_FORWARD(UMFA_KERNEL, UMFA_T, UMFA_M, UMFA_D, UMFA_BK, UMFA_QF, UMFA_SIMDGROUPS)
#else
// Compiled ahead: every shape that src/metal/tiles.h can ask for.
#define UMFA_FORWARD_16BIT(NAME, T, D, BK) \
    UMFA_FORWARD("forward_" NAME "_d" #D "_k" #BK, T, T, D, BK, 1, 4)
#define UMFA_FORWARD_ALL_16BIT(NAME, T)  \
    UMFA_FORWARD_16BIT(NAME, T, 32, 32)  \
    UMFA_FORWARD_16BIT(NAME, T, 64, 32)  \
    UMFA_FORWARD_16BIT(NAME, T, 80, 32)  \
    UMFA_FORWARD_16BIT(NAME, T, 96, 32)  \
    UMFA_FORWARD_16BIT(NAME, T, 128, 16) \
    UMFA_FORWARD_16BIT(NAME, T, 128, 32) \
    UMFA_FORWARD_16BIT(NAME, T, 160, 16) \
    UMFA_FORWARD_16BIT(NAME, T, 192, 16) \
    UMFA_FORWARD_16BIT(NAME, T, 256, 16)
#define UMFA_FORWARD_32BIT(NAME, T, D, BK) \
    UMFA_FORWARD("forward_" NAME "_d" #D "_k" #BK, T, float, D, BK, 1, 4)
#define UMFA_FORWARD_ALL_32BIT(NAME, T)  \
    UMFA_FORWARD_32BIT(NAME, T, 32, 32)  \
    UMFA_FORWARD_32BIT(NAME, T, 64, 32)  \
    UMFA_FORWARD_32BIT(NAME, T, 80, 16)  \
    UMFA_FORWARD_32BIT(NAME, T, 96, 16)  \
    UMFA_FORWARD_32BIT(NAME, T, 128, 16) \
    UMFA_FORWARD_32BIT(NAME, T, 160, 8)  \
    UMFA_FORWARD_32BIT(NAME, T, 192, 8)  \
    UMFA_FORWARD_32BIT(NAME, T, 256, 8)
UMFA_FORWARD_ALL_16BIT("f16", half)
UMFA_FORWARD_ALL_16BIT("bf16", bfloat)
UMFA_FORWARD_ALL_32BIT("bf16_as_f32", bfloat)
UMFA_FORWARD_ALL_32BIT("f32", float)
#endif
