// Gradient of a mask that is added to the scores (gradients.h has the formulas). It has the mask's own
// shape, summed where the mask broadcasts.
//
// Each threadgroup owns a piece of the mask, a block of rows times a tile of columns, and goes over all
// that shares it: sequences, heads and, where the mask has one row or one column for all, blocks of
// queries or tiles of keys. It computes S and dP of each again, and writes each element once: no
// atomics, and nothing of the size of the scores but the gradient itself.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "shared/backward_shapes.h"
#include "shared/constants.h"
#include "shared/fragment.h"
#include "shared/gradients.h"
#include "shared/indices.h"
#include "shared/params.h"
#include "shared/products.h"
#include "shared/query_gradients.h"
#include "shared/rotary.h"
#include "shared/rotated_rows.h"
#include "shared/scores.h"
#include "shared/sequence.h"
#include "shared/staged.h"
#include "shared/threadgroup_memory.h"
#include "shared/tile.h"
#include "shared/visible.h"

using namespace metal;

using namespace umfa;

namespace umfa {

/// Sum over the rows of a fragment; `x` is this lane's own sum of a column.
inline float column_sum(float x) {
    x += simd_shuffle_xor(x, ushort(2));
    x += simd_shuffle_xor(x, ushort(4));
    return x + simd_shuffle_xor(x, ushort(16));
}

/// `to` advanced by `elements` of a mask.
inline device uchar* moved_number(device uchar* to, int kind, int64_t elements) {
    return to + elements * (kind == UMFA_MASK_F32 ? 4 : 2);
}

/// Rounds x and writes it as element `index` of a mask.
inline void store_number(device uchar* to, int kind, int64_t index, float x) {
    if (kind == UMFA_MASK_F32) reinterpret_cast<device float*>(to)[index] = x;
    if (kind == UMFA_MASK_F16) reinterpret_cast<device half*>(to)[index] = half(x);
    if (kind == UMFA_MASK_BF16) reinterpret_cast<device bfloat*>(to)[index] = bfloat(x);
}

/// A piece of the gradient that each lane has two columns of.
template <int ROWS, int KF>
UMFA_INLINE void store_piece(device uchar* to, constant MaskGradientParams& params,
                             thread Fragment<float> (&sum)[ROWS][KF], int first_row,
                             int first_column, LaneMap at) {
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = first_row + f * 8 + at.row;
#pragma clang loop unroll(full)
        for (int j = 0; j < KF; ++j) {
            const int column = first_column + j * 8 + at.column;
            const int64_t index = row * params.row + column * params.column;
            const float2 x = pair_of(sum[f][j]) * params.factor;
            if (row < params.rows && column < params.columns)
                store_number(to, dmask_kind, index, x.x);
            if (row < params.rows && column + 1 < params.columns)
                store_number(to, dmask_kind, index + params.column, x.y);
        }
    }
}

/// Where one column is for all keys: the sum of each row.
template <int ROWS, int KF>
UMFA_INLINE void store_row_sums(device uchar* to, constant MaskGradientParams& params,
                                thread Fragment<float> (&sum)[ROWS][KF], int first_row,
                                LaneMap at) {
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = first_row + f * 8 + at.row;
        float own = 0.0f;
#pragma clang loop unroll(full)
        for (int j = 0; j < KF; ++j) {
            const float2 x = pair_of(sum[f][j]);
            own += x.x + x.y;
        }
        own = row_sum(own);
        if (at.column == 0 && row < params.rows)
            store_number(to, dmask_kind, row * params.row, own * params.factor);
    }
}

/// Where one row is for all queries: each simdgroup's sum of each column.
template <int ROWS, int KF>
UMFA_INLINE void write_column_sums(threadgroup float* mine, thread Fragment<float> (&sum)[ROWS][KF],
                                   LaneMap at) {
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        float2 own = float2(0.0f);
#pragma clang loop unroll(full)
        for (int f = 0; f < ROWS; ++f) own += pair_of(sum[f][j]);
        own = float2(column_sum(own.x), column_sum(own.y));
        if (at.row != 0) continue;
        mine[j * 8 + at.column] = own.x;
        mine[j * 8 + at.column + 1] = own.y;
    }
}

}  // namespace umfa

template <typename T, typename M, int D, int DV, int TILE, int ROWS, int SIMDGROUPS, int SPLIT,
          bool ONE_TILE>
[[kernel]] void umfa_dmask(
    device const uchar* query [[buffer(UMFA_DMASK_QUERY)]],
    device const uchar* key [[buffer(UMFA_DMASK_KEY)]],
    device const uchar* value [[buffer(UMFA_DMASK_VALUE)]],
    device const uchar* dout [[buffer(UMFA_DMASK_DOUT)]],
    device const float2* statistics [[buffer(UMFA_DMASK_STATISTICS)]],
    device const uchar* mask [[buffer(UMFA_DMASK_MASK)]],
    device const float* slopes UMFA_BUFFER_IF(UMFA_DMASK_SLOPES, has_alibi),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_DMASK_SEQUENCES, has_sequences),
    device uchar* dmask [[buffer(UMFA_DMASK_DMASK)]],
    device const uchar* rotary_cos UMFA_BUFFER_IF(UMFA_DMASK_ROTARY_COS, has_rotary),
    device const uchar* rotary_sin UMFA_BUFFER_IF(UMFA_DMASK_ROTARY_SIN, has_rotary),
    device const uchar* qv UMFA_BUFFER_IF(UMFA_DMASK_QV, has_qv),
    constant MaskGradientParams& params [[buffer(UMFA_DMASK_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    using E = typename Staged<T, M>::Type;
    constexpr int THREADS = 32 * SIMDGROUPS, BLOCK = 8 * ROWS * SIMDGROUPS / SPLIT;
    constexpr int KF = TILE / 8, DF = D / SPLIT / 8, DVF = DV / SPLIT / 8;  // fragments
    constexpr int K_ROW = tile_row<E>(D), V_ROW = tile_row<E>(DV);
    static_assert(!ONE_TILE || (D >= DV && SPLIT > 1), "not a shape of one tile");
    threadgroup uint4 k_words[tile_words(TILE, D, sizeof(E))];
    threadgroup uint4 v_words[second_tile_words(TILE, DV, ONE_TILE, sizeof(E))];
    threadgroup float2 parts[backward_parts(TILE, ROWS, SIMDGROUPS, SPLIT)];
    threadgroup E* k_tile = reinterpret_cast<threadgroup E*>(k_words);
    threadgroup E* v_tile = ONE_TILE ? k_tile : reinterpret_cast<threadgroup E*>(v_words);

    constant BackwardParams& call = params.backward;
    group = place_in_grid(group, call.forward);
    const LaneMap at = lane_map(lane);
    const ushort thread_index = simdgroup * 32 + lane;
    const int first_row = group.x / params.tiles * BLOCK,
              first_column = group.x % params.tiles * TILE;
    const int place = simdgroup / SPLIT * 8 * ROWS, part = simdgroup % SPLIT;
    const int first_batch = int(group.z) * params.batches, first_head = int(group.y) * params.heads;
    const float unit = scale_last ? call.forward.score_scale : 1.0f;
    const Rotary of_keys = rotary_of(call.forward.rotary, rotary_cos, rotary_sin);
    Fragment<float> sum[ROWS][KF];
    clear(sum);

    for (int batch = first_batch; batch < first_batch + params.batches; ++batch) {
        const SequenceParams sequence = sequence_at(call.forward, sequences, batch);
        const Rotary of_queries = rotary_from(of_keys, sequence.position_q);
        const Visible<int> range = visible_of(call.forward, sequence);
        const int seqlen_q = sequence.seqlen_q, seqlen_kv = sequence.visibility.seqlen_kv;
        const int rows_end = params.all_rows != 0 ? seqlen_q : min(first_row + BLOCK, seqlen_q);
        for (int head = first_head; head < first_head + params.heads; ++head) {
            const int head_kv = head / call.forward.group;
            device const uchar* own_query =
                first_query<T>(query, query_kind, call.forward.query, sequence, head);
            device const uchar* own_dout =
                first_query<T>(dout, dout_kind, call.dout, sequence, head);
            device const uchar* own_key =
                first_key<T>(key, key_kind, call.forward.key, sequence, head_kv);
            device const uchar* own_value =
                first_key<T>(value, value_kind, call.forward.value, sequence, head_kv);
            device const float2* own_statistics =
                statistics + statistics_before(call.statistics, sequence, head);
            for (int row0 = first_row; row0 < rows_end; row0 += BLOCK) {
                const int last_row = min(row0 + BLOCK, seqlen_q) - 1, my_row = row0 + place;
                const SeenBounds<int> block = seen_bounds(range, row0, last_row);
                const SeenBounds<int> mine =
                    seen_bounds(range, my_row, min(my_row + 8 * ROWS, seqlen_q) - 1);
                int k0 = first_column, keys_end = min(first_column + TILE, seqlen_kv);
                if (params.all_columns != 0) {
                    k0 = next_tile(range, row0, last_row, 0, TILE);
                    keys_end = span_end(range, last_row);
                } else if (!touches(block, k0, TILE)) {
                    continue;
                }
                Fragment<M> q[ROWS][DF], g[ROWS][DVF], q_of_v[ROWS][DVF];
                ScoreRow rows[ROWS];
                float2 of_row[ROWS];
                load_rotated_rows<T>(q, own_query, query_kind, call.forward.query, my_row, seqlen_q,
                                     part, call.forward.head_dim, of_queries, at);
                load_rows<T>(g, own_dout, dout_kind, call.dout, my_row, seqlen_q, part,
                             call.forward.head_dim_v, at);
                if (has_qv)
                    load_rows<T>(q_of_v,
                                 first_query<T>(qv, query_kind, call.forward.qv, sequence, head),
                                 query_kind, call.forward.qv, my_row, seqlen_q, part,
                                 call.forward.head_dim_v, at);
#pragma clang loop unroll(full)
                for (int f = 0; f < ROWS; ++f) {
                    const int row = my_row + f * 8 + at.row;
                    rows[f] = score_row(call.forward, slopes, batch, head, row,
                                        sequence.visibility.offset);
                    of_row[f] =
                        row < seqlen_q ? own_statistics[row * call.statistics.row] : float2(0.0f);
                }
                for (; k0 < keys_end; k0 = params.all_columns != 0
                                               ? tile_after(range, row0, last_row, k0, TILE)
                                               : keys_end) {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    if (!ONE_TILE)
                        stage_rotated_rows<E, T, D, TILE, THREADS>(
                            k_tile, own_key, key_kind, call.forward.key, k0, seqlen_kv,
                            call.forward.head_dim, of_keys, thread_index);
                    stage_rows<E, T, DV, TILE, THREADS>(v_tile, own_value, value_kind,
                                                        call.forward.value, k0, seqlen_kv,
                                                        call.forward.head_dim_v, thread_index);
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    const bool sees = my_row < seqlen_q && touches(mine, k0, TILE);
                    if (SPLIT == 1 && !sees) continue;  // no barrier follows in this tile

                    Fragment<float> s[ROWS][KF], dp[ROWS][KF];
                    clear(s);
                    clear(dp);
                    if (sees) {
                        if (!ONE_TILE) add_products<K_ROW>(s, q, k_tile + part * DF * 8, at);
                        if (has_qv) add_products<V_ROW>(s, q_of_v, v_tile + part * DVF * 8, at);
                        add_products<V_ROW>(dp, g, v_tile + part * DVF * 8, at);
                    }
                    if (ONE_TILE) {
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        stage_rotated_rows<E, T, D, TILE, THREADS>(
                            k_tile, own_key, key_kind, call.forward.key, k0, seqlen_kv,
                            call.forward.head_dim, of_keys, thread_index);
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        if (sees) add_products<K_ROW>(s, q, k_tile + part * DF * 8, at);
                    }
                    if (SPLIT > 1) add_two_parts<SPLIT>(s, dp, parts, simdgroup, lane);
                    if (!sees) continue;

                    const bool mixed = !covers(mine, k0, TILE);
                    Fragment<float> ds[ROWS][KF];
                    float unused = 0.0f;
#pragma clang loop unroll(full)
                    for (int f = 0; f < ROWS; ++f) {
                        query_gradients<true>(ds, s, dp, f, rows[f], of_row[f], batch, head, k0,
                                              mixed, range, unit, call.forward, mask, unused, at);
                        if (my_row + f * 8 + at.row >= seqlen_q) continue;
#pragma clang loop unroll(full)
                        for (int j = 0; j < KF; ++j)
                            set_pair(sum[f][j], pair_of(sum[f][j]) + pair_of(ds[f][j]));
                    }
                }
            }
        }
    }

    dmask = moved_number(dmask, dmask_kind,
                         int64_t(group.z) * params.batch + int64_t(group.y) * params.head);
    if (params.all_columns != 0) {
        if (part == 0) store_row_sums(dmask, params, sum, first_row + place, at);
        return;
    }
    if (params.all_rows == 0) {
        if (part == 0) store_piece(dmask, params, sum, first_row + place, first_column, at);
        return;
    }
    threadgroup float* columns = reinterpret_cast<threadgroup float*>(k_words);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (part == 0) write_column_sums(columns + simdgroup / SPLIT * TILE, sum, at);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int column = first_column + thread_index;
    if (thread_index >= TILE || column >= params.columns) return;
    float total = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < SIMDGROUPS / SPLIT; ++i) total += columns[i * TILE + thread_index];
    store_number(dmask, dmask_kind, column * params.column, total * params.factor);
}

#define UMFA_DMASK(NAME, ...) \
    template                  \
        [[host_name(NAME)]] [[kernel]] decltype(umfa_dmask<__VA_ARGS__>) umfa_dmask<__VA_ARGS__>;

#ifdef UMFA_KERNEL
UMFA_DMASK(UMFA_KERNEL, UMFA_T, UMFA_M, UMFA_SHAPE)
#else
// Compiled ahead: every shape that the planner can ask for.
#define UMFA_DMASK_NAME(TYPE, D, DV, TILE) "dmask_" TYPE "_d" #D "_v" #DV "_k" #TILE
#define UMFA_DMASK_F16(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)            \
    UMFA_DMASK(UMFA_DMASK_NAME("f16", D, DV, TILE), half, half, D, DV, TILE, ROWS, SIMDGROUPS, \
               SPLIT, ONE_TILE)
#define UMFA_DMASK_BF16(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)    \
    UMFA_DMASK(UMFA_DMASK_NAME("bf16", D, DV, TILE), bfloat, bfloat, D, DV, TILE, ROWS, \
               SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DMASK_F32(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)              \
    UMFA_DMASK(UMFA_DMASK_NAME("f32", D, DV, TILE), float, float, D, DV, TILE, ROWS, SIMDGROUPS, \
               SPLIT, ONE_TILE)
#define UMFA_DMASK_BF16_AS_F32(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)   \
    UMFA_DMASK(UMFA_DMASK_NAME("bf16_as_f32", D, DV, TILE), bfloat, float, D, DV, TILE, ROWS, \
               SIMDGROUPS, SPLIT, ONE_TILE)
UMFA_DQ_SHAPES_16(UMFA_DMASK_F16)
UMFA_DQ_SHAPES_16(UMFA_DMASK_BF16)
UMFA_DQ_SHAPES_32(UMFA_DMASK_F32)
UMFA_DQ_SHAPES_WIDENED(UMFA_DMASK_BF16_AS_F32)
#endif
