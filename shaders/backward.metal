// Gradients of attention on simdgroup matrices (Dao et al. 2022; gradients.h has the formulas).
//
// Two kernels without atomics, so that the results are deterministic: umfa_dq owns blocks of queries
// and reads tiles of keys, umfa_dkv owns blocks of keys and reads tiles of the queries of each head of
// the group. S and dP are computed in both. That makes seven products instead of five.
//
// Each simdgroup owns 8 * ROWS rows and keeps their operands and gradients in registers; where the
// channels are too many for that, SPLIT simdgroups share a block of rows, each with its share of the
// channels, and add up their partial S and dP through threadgroup memory. In umfa_dkv S and dP are
// transposed: rows are keys. Then P^T and dS^T are left operands as they are.
//
// ONE_TILE: with head dims above 256, threadgroup memory holds one tile at a time. V (dO) comes first, for
// dP, and K (Q) takes its place. What a gradient needs of V or dO is staged again: dO for dV, V for dQv. No
// product is computed twice.
//
// Before them, umfa_delta computes what both need of each query.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "shared/backward_shapes.h"
#include "shared/constants.h"
#include "shared/dropout.h"
#include "shared/fragment.h"
#include "shared/gradients.h"
#include "shared/indices.h"
#include "shared/operand.h"
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

/// Times a factor.
template <typename G>
inline void scale(thread Fragment<G>& x, float factor) {
    set(x, G(float(x.thread_elements()[0]) * factor), G(float(x.thread_elements()[1]) * factor));
}
template <int ROWS, int QF, typename G>
inline void scale(thread Fragment<G> (&x)[ROWS][QF], float factor) {
#pragma clang loop unroll(full)
    for (int i = 0; i < ROWS * QF; ++i) scale(x[i / QF][i % QF], factor);
}

/// P and dS of one key in a tile of queries. `statistics`: of the tile's queries. `counting`: P is 1
/// where the key is seen, and no dS is needed.
template <int ROWS, int QF, typename M, typename G>
UMFA_INLINE void key_gradients(thread Fragment<M> (&p)[ROWS][QF],
                               thread Fragment<G> (&ds)[ROWS][QF],
                               thread Fragment<float> (&s)[ROWS][QF],
                               thread Fragment<float> (&dp)[ROWS][QF], int f,
                               thread const ScoreRow& row, threadgroup const float2* statistics,
                               int batch, int head, int q0, bool mixed, Visible<int> by, int prefix,
                               float unit, constant ForwardParams& params, device const uchar* mask,
                               bool counting, LaneMap at) {
    VisibleRow seen = {0, 0, 0};
    if (mixed) seen = seer_row(by, prefix, row.row);
#pragma clang loop unroll(full)
    for (int j = 0; j < QF; ++j) {
        const int own = j * 8 + at.column, column = q0 + own;
        const float4 both = *reinterpret_cast<threadgroup const float4*>(statistics + own);
        float2 x = pair_of(s[f][j]), d = pair_of(dp[f][j]);
        float first_slope = 1.0f, second_slope = 1.0f;
        x.x = biased_with_slope(x.x, row, column, params, first_slope);
        x.y = biased_with_slope(x.y, row, column + 1, params, second_slope);
        if (has_mask) x = masked_queries(x, row, column, by.seqlen_kv, params, mask);
        if (mixed) {
            x.x = sees(seen, column) ? x.x : lowest;
            x.y = sees(seen, column + 1) ? x.y : lowest;
        }
        if (counting) {
            set(p[f][j], M(x.x > lowest ? 1.0f : 0.0f), M(x.y > lowest ? 1.0f : 0.0f));
            continue;
        }
        const float2 all =
            float2(probability(x.x, unit, both.x, mixed), probability(x.y, unit, both.z, mixed));
        float2 kept = all;
        if (has_dropout) {
            const bool keeps_first = keeps(params.dropout, batch, head, column, row.row);
            const bool keeps_second = keeps(params.dropout, batch, head, column + 1, row.row);
            kept = float2(keeps_first ? kept.x : 0.0f, keeps_second ? kept.y : 0.0f);
            d = float2(keeps_first ? d.x : 0.0f, keeps_second ? d.y : 0.0f) * params.dropout.factor;
        }
        if (wants_dv) set(p[f][j], M(kept.x), M(kept.y));
        if (!wants_dk && !has_qv) continue;
        float2 g =
            float2(times_unless_zero(all.x, d.x - both.y), times_unless_zero(all.y, d.y - both.w));
        if (has_softcap) g *= float2(first_slope, second_slope);
        set(ds[f][j], G(g.x), G(g.y));
    }
}

/// Four channels of a row, for the dtype that `kind` gives.
template <typename T>
inline void any_elements(thread float* x, device const uchar* row, int kind,
                         constant OperandStrides& strides, int column, int columns) {
    if (kind == UMFA_MASK_F16)
        load_elements<4>(x, reinterpret_cast<device const typename Narrow<T>::Half*>(row), strides,
                         true, column, columns);
    else if (kind == UMFA_MASK_BF16)
        load_elements<4>(x, reinterpret_cast<device const typename Narrow<T>::Bfloat*>(row),
                         strides, true, column, columns);
    else
        load_elements<4>(x, reinterpret_cast<device const T*>(row), strides, true, column, columns);
}

}  // namespace umfa

/// What both kernels need of a query: its log-sum-exp in units of log2, less what raises P, and D =
/// rowsum(dO * O) - dL. Each simdgroup has one row.
template <typename T>
[[kernel]] void umfa_delta(device const uchar* out [[buffer(UMFA_DELTA_OUT)]],
                           device const float* lse [[buffer(UMFA_DELTA_LSE)]],
                           device const uchar* dout [[buffer(UMFA_DELTA_DOUT)]],
                           device const float* dlse UMFA_BUFFER_IF(UMFA_DELTA_DLSE, has_dlse),
                           device float2* statistics [[buffer(UMFA_DELTA_STATISTICS)]],
                           constant BackwardParams& params [[buffer(UMFA_DELTA_PARAMS)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           uint3 threads [[threads_per_threadgroup]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]]) {
    const int row = group.x * (threads.x / 32) + simdgroup, head = group.y;
    const int64_t batch = group.z;
    if (row >= params.rows) return;
    constant OperandStrides& lse_at = params.forward.lse;
    out = moved<T>(out, out_kind,
                   batch * params.forward.out.batch + head * params.forward.out.head +
                       row * params.forward.out.row);
    dout = moved<T>(dout, dout_kind,
                    batch * params.dout.batch + head * params.dout.head + row * params.dout.row);
    float sum = 0.0f;
    for (int column = 4 * lane; column < params.forward.head_dim_v; column += 128) {
        float o[4], g[4];
        any_elements<T>(o, out, out_kind, params.forward.out, column, params.forward.head_dim_v);
        any_elements<T>(g, dout, dout_kind, params.dout, column, params.forward.head_dim_v);
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; ++i) sum = fma(o[i], g[i], sum);
    }
    sum = simd_sum(sum);
    if (lane != 0) return;
    if (has_dlse)
        sum -= dlse[batch * params.dlse.batch + head * params.dlse.head + row * params.dlse.row];
    const float own = lse[batch * lse_at.batch + head * lse_at.head + row * lse_at.row];
    // Of a query that sees no key all scores are `lowest`: any number near 0 makes their weights 0. So it
    // is where the mask of all keys is about the lowest finite number: the log-sum-exp of such a row does
    // not tell how many keys share it.
    const bool nothing = is_minus_infinity(own) || own < -1e37f;
    float of_row = nothing ? 0.0f : own * log2_e - params.raised;
    if (as_type<uint>(own) == infinity_bits) of_row = as_type<float>(uint(nan_bits));
    statistics[batch * params.statistics.batch + head * params.statistics.head +
               row * params.statistics.row] = float2(of_row, sum);
}

/// dQ of a block of queries. Long, since threadgroup memory is declared in kernels alone and a tile's
/// products and staging share their barriers; so is the next.
template <typename T, typename M, int D, int DV, int TILE, int ROWS, int SIMDGROUPS, int SPLIT,
          bool ONE_TILE>
[[kernel]] void umfa_dq(
    device const uchar* query [[buffer(UMFA_BACKWARD_QUERY)]],
    device const uchar* key [[buffer(UMFA_BACKWARD_KEY)]],
    device const uchar* value [[buffer(UMFA_BACKWARD_VALUE)]],
    device const uchar* dout [[buffer(UMFA_BACKWARD_DOUT)]],
    device const float2* statistics [[buffer(UMFA_BACKWARD_STATISTICS)]],
    device const uchar* mask UMFA_BUFFER_IF(UMFA_BACKWARD_MASK, has_mask),
    device const float* slopes UMFA_BUFFER_IF(UMFA_BACKWARD_SLOPES, has_alibi),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_BACKWARD_SEQUENCES, has_sequences),
    device const SequenceTask* tasks UMFA_BUFFER_IF(UMFA_BACKWARD_TASKS, has_sequences),
    device uchar* dq UMFA_BUFFER_IF(UMFA_BACKWARD_DQ, wants_dq),
    device float* slope_terms UMFA_BUFFER_IF(UMFA_BACKWARD_SLOPE_TERMS, wants_dslopes),
    device const uchar* rotary_cos UMFA_BUFFER_IF(UMFA_BACKWARD_ROTARY_COS, has_rotary),
    device const uchar* rotary_sin UMFA_BUFFER_IF(UMFA_BACKWARD_ROTARY_SIN, has_rotary),
    device const uchar* qv UMFA_BUFFER_IF(UMFA_BACKWARD_QV, has_qv),
    device uchar* dqv UMFA_BUFFER_IF(UMFA_BACKWARD_DQV, wants_dqv),
    constant BackwardParams& params [[buffer(UMFA_BACKWARD_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    using G = typename ScoreGradient<M>::Type;
    using E = typename Staged<T, M>::Type;
    constexpr int THREADS = 32 * SIMDGROUPS, BLOCK = 8 * ROWS * SIMDGROUPS / SPLIT;
    constexpr int KF = TILE / 8, DF = D / SPLIT / 8, DVF = DV / SPLIT / 8;  // fragments
    constexpr int K_ROW = tile_row<E>(D), V_ROW = tile_row<E>(DV);
    static_assert(!ONE_TILE || (D >= DV && SPLIT > 1), "not a shape of one tile");
    threadgroup uint4 k_words[rotated_back_words(TILE, D, sizeof(E))];
    threadgroup uint4 v_words[second_tile_words(TILE, DV, ONE_TILE, sizeof(E))];
    threadgroup float2 parts[backward_parts(TILE, ROWS, SIMDGROUPS, SPLIT)];
    threadgroup uint votes[SIMDGROUPS];
    threadgroup E* k_tile = reinterpret_cast<threadgroup E*>(k_words);
    threadgroup E* v_tile = ONE_TILE ? k_tile : reinterpret_cast<threadgroup E*>(v_words);

    group = place_in_grid(group, params.forward);
    const LaneMap at = lane_map(lane);
    const ushort thread_index = simdgroup * 32 + lane;
    const int head = group.y, head_kv = head / params.forward.group;
    int batch = group.z, first_row = group.x * BLOCK;
    if (has_sequences) {
        batch = tasks[group.x].sequence;
        first_row = tasks[group.x].first_row;
    }
    const SequenceParams sequence = sequence_at(params.forward, sequences, batch);
    const int seqlen_q = sequence.seqlen_q, seqlen_kv = sequence.visibility.seqlen_kv;
    const int my_row = first_row + simdgroup / SPLIT * 8 * ROWS, part = simdgroup % SPLIT;

    query = first_query<T>(query, query_kind, params.forward.query, sequence, head);
    dout = first_query<T>(dout, dout_kind, params.dout, sequence, head);
    key = first_key<T>(key, key_kind, params.forward.key, sequence, head_kv);
    value = first_key<T>(value, value_kind, params.forward.value, sequence, head_kv);
    statistics += statistics_before(params.statistics, sequence, head);

    Fragment<M> q[ROWS][DF], g[ROWS][DVF], q_of_v[ROWS][DVF];
    Fragment<float> sum[ROWS][DF], sum_of_v[ROWS][DVF];
    ScoreRow rows[ROWS];
    float2 of_row[ROWS];
    float slope_sums[ROWS];
    const Rotary of_keys = rotary_of(params.forward.rotary, rotary_cos, rotary_sin);
    const Rotary of_queries = rotary_from(of_keys, sequence.position_q);
    load_rotated_rows<T>(q, query, query_kind, params.forward.query, my_row, seqlen_q, part,
                         params.forward.head_dim, of_queries, at);
    load_rows<T>(g, dout, dout_kind, params.dout, my_row, seqlen_q, part, params.forward.head_dim_v,
                 at);
    if (has_qv) {
        qv = first_query<T>(qv, query_kind, params.forward.qv, sequence, head);
        load_rows<T>(q_of_v, qv, query_kind, params.forward.qv, my_row, seqlen_q, part,
                     params.forward.head_dim_v, at);
    }
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = my_row + f * 8 + at.row;
        rows[f] = score_row(params.forward, slopes, batch, head, row, sequence.visibility.offset);
        of_row[f] = row < seqlen_q ? statistics[row * params.statistics.row] : float2(0.0f);
    }

    const Visible<int> range = visible_of(params.forward, sequence);
    const int last_row = min(first_row + BLOCK, seqlen_q) - 1;
    const int tiles_begin = next_tile(range, first_row, last_row, 0, TILE);
    const int tiles_end = span_end(range, last_row);
    const SeenBounds<int> mine = seen_bounds(range, my_row, min(my_row + 8 * ROWS, seqlen_q) - 1);
    const bool hides = has_mask || !covers(seen_bounds(range, first_row, last_row), tiles_begin,
                                           max(tiles_end - tiles_begin, 0));
    const float unit = scale_last ? params.forward.score_scale : 1.0f;
    // One pass, unless it meets NaN or infinities where keys are hidden (gradients.h).
    for (int pass = hides ? 0 : -1;; ++pass) {
        clear(sum);
        if (wants_dqv) clear(sum_of_v);
#pragma clang loop unroll(full)
        for (int f = 0; f < ROWS; ++f) slope_sums[f] = 0.0f;
        for (int k0 = tiles_begin; k0 < tiles_end;
             k0 = tile_after(range, first_row, last_row, k0, TILE)) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (!ONE_TILE)
                stage_rotated_rows<E, T, D, TILE, THREADS>(
                    k_tile, key, key_kind, params.forward.key, k0, seqlen_kv,
                    params.forward.head_dim, of_keys, thread_index);
            stage_rows<E, T, DV, TILE, THREADS>(v_tile, value, value_kind, params.forward.value, k0,
                                                seqlen_kv, params.forward.head_dim_v, thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const bool sees = my_row < seqlen_q && touches(mine, k0, TILE);
            if (SPLIT == 1 && !sees && pass <= 0) continue;  // no barrier follows in this tile

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
                    k_tile, key, key_kind, params.forward.key, k0, seqlen_kv,
                    params.forward.head_dim, of_keys, thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (sees) add_products<K_ROW>(s, q, k_tile + part * DF * 8, at);
            }
            if (SPLIT > 1) add_two_parts<SPLIT>(s, dp, parts, simdgroup, lane);
            if (pass > 0) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                guard_rows<TILE, D, K_ROW, THREADS>(k_tile, 3, thread_index);
                if (wants_dqv && !ONE_TILE)
                    guard_rows<TILE, DV, V_ROW, THREADS>(v_tile, 3, thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            if (!sees && !(ONE_TILE && wants_dqv)) continue;

            const bool mixed = !covers(mine, k0, TILE);
            Fragment<G> ds[ROWS][KF];
#pragma clang loop unroll(full)
            for (int f = 0; f < ROWS && sees; ++f)
                query_gradients<false>(ds, s, dp, f, rows[f], of_row[f], batch, head, k0, mixed,
                                       range, unit, params.forward, mask, slope_sums[f], at);
            if (wants_dq && sees) accumulate<K_ROW>(sum, ds, k_tile + part * DF * 8, at);
            if (!wants_dqv) continue;
            if (ONE_TILE)
                restage_rows<E, T, DV, TILE, THREADS>(
                    v_tile, value, value_kind, params.forward.value, k0, seqlen_kv,
                    params.forward.head_dim_v, pass > 0 ? 3 : 0, thread_index);
            if (sees) accumulate<V_ROW>(sum_of_v, ds, v_tile + part * DVF * 8, at);
        }
        if (pass != 0) break;
        bool again = false;
        if (wants_dq)
            again = any_spoiled_rows<SIMDGROUPS>(sum, my_row, seqlen_q, votes, thread_index, at);
        if (wants_dqv)
            again =
                any_spoiled_rows<SIMDGROUPS>(sum_of_v, my_row, seqlen_q, votes, thread_index, at) ||
                again;
        if (!again) break;
    }

    if (wants_dslopes) {
        slope_terms += statistics_before(params.statistics, sequence, head);
#pragma clang loop unroll(full)
        for (int f = 0; f < ROWS; ++f) {
            const int row = my_row + f * 8 + at.row;
            const float term = row_sum(slope_sums[f]);
            if (row < seqlen_q && at.column == 0 && part == 0)
                slope_terms[row * params.statistics.row] = term;
        }
    }
    if (wants_dqv) {
        dqv = moved_gradient<T>(dqv, dqv_kind,
                                sequence.query_batch * params.dqv.batch +
                                    sequence.query_row * params.dqv.row + head * params.dqv.head);
        store_gradient_rows<T>(dqv, dqv_kind, params.dqv, sum_of_v, my_row, seqlen_q, part,
                               params.forward.head_dim_v, params.score_factor, at);
    }
    if (!wants_dq) return;
    dq = moved_gradient<T>(dq, dq_kind,
                           sequence.query_batch * params.dq.batch +
                               sequence.query_row * params.dq.row + head * params.dq.head);
    store_rotated_rows<T, D, SIMDGROUPS, SPLIT>(
        dq, dq_kind, params.dq, sum, reinterpret_cast<threadgroup float*>(k_words), first_row,
        seqlen_q, params.forward.head_dim, params.score_factor, of_queries, thread_index, at);
}

/// dK and dV of a block of keys, over all heads that share them.
template <typename T, typename M, int D, int DV, int TILE, int ROWS, int SIMDGROUPS, int SPLIT,
          bool ONE_TILE>
[[kernel]] void umfa_dkv(
    device const uchar* query [[buffer(UMFA_BACKWARD_QUERY)]],
    device const uchar* key [[buffer(UMFA_BACKWARD_KEY)]],
    device const uchar* value [[buffer(UMFA_BACKWARD_VALUE)]],
    device const uchar* dout [[buffer(UMFA_BACKWARD_DOUT)]],
    device const float2* statistics [[buffer(UMFA_BACKWARD_STATISTICS)]],
    device const uchar* mask UMFA_BUFFER_IF(UMFA_BACKWARD_MASK, has_mask),
    device const float* slopes UMFA_BUFFER_IF(UMFA_BACKWARD_SLOPES, has_alibi),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_BACKWARD_SEQUENCES, has_sequences),
    device const SequenceTask* tasks UMFA_BUFFER_IF(UMFA_BACKWARD_TASKS, has_sequences),
    device uchar* dk UMFA_BUFFER_IF(UMFA_BACKWARD_DK, wants_dk),
    device uchar* dv UMFA_BUFFER_IF(UMFA_BACKWARD_DV, wants_dv),
    device const uchar* rotary_cos UMFA_BUFFER_IF(UMFA_BACKWARD_ROTARY_COS, has_rotary),
    device const uchar* rotary_sin UMFA_BUFFER_IF(UMFA_BACKWARD_ROTARY_SIN, has_rotary),
    device const uchar* qv UMFA_BUFFER_IF(UMFA_BACKWARD_QV, has_qv),
    constant BackwardParams& params [[buffer(UMFA_BACKWARD_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    using G = typename ScoreGradient<M>::Type;
    using E = typename Staged<T, M>::Type;
    constexpr int THREADS = 32 * SIMDGROUPS, BLOCK = 8 * ROWS * SIMDGROUPS / SPLIT;
    constexpr int QF = TILE / 8, DF = D / SPLIT / 8, DVF = DV / SPLIT / 8;  // fragments
    constexpr int Q_ROW = tile_row<E>(D), G_ROW = tile_row<E>(DV);
    static_assert(!ONE_TILE || (D >= DV && SPLIT > 1), "not a shape of one tile");
    threadgroup uint4 q_words[rotated_back_words(TILE, D, sizeof(E))];
    threadgroup uint4 g_words[second_tile_words(TILE, DV, ONE_TILE, sizeof(E))];
    threadgroup float2 parts[backward_parts(TILE, ROWS, SIMDGROUPS, SPLIT)];
    threadgroup float4 of_rows[TILE / 2];
    threadgroup uint votes[SIMDGROUPS];
    threadgroup E* q_tile = reinterpret_cast<threadgroup E*>(q_words);
    threadgroup E* g_tile = ONE_TILE ? q_tile : reinterpret_cast<threadgroup E*>(g_words);
    threadgroup float2* of_row = reinterpret_cast<threadgroup float2*>(of_rows);

    group = place_in_grid(group, params.forward);
    const LaneMap at = lane_map(lane);
    const ushort thread_index = simdgroup * 32 + lane;
    const int head_kv = group.y;
    int batch = group.z, first_row = group.x * BLOCK;
    if (has_sequences) {
        batch = tasks[group.x].sequence;
        first_row = tasks[group.x].first_row;
    }
    const SequenceParams sequence = sequence_at(params.forward, sequences, batch);
    const int seqlen_q = sequence.seqlen_q, seqlen_kv = sequence.visibility.seqlen_kv;
    const int my_row = first_row + simdgroup / SPLIT * 8 * ROWS, part = simdgroup % SPLIT;

    key = first_key<T>(key, key_kind, params.forward.key, sequence, head_kv);
    value = first_key<T>(value, value_kind, params.forward.value, sequence, head_kv);
    Fragment<M> k[ROWS][DF], v[ROWS][DVF];
    Fragment<float> k_sum[ROWS][DF], v_sum[ROWS][DVF];
    const Rotary of_keys = rotary_of(params.forward.rotary, rotary_cos, rotary_sin);
    const Rotary of_queries = rotary_from(of_keys, sequence.position_q);
    load_rotated_rows<T>(k, key, key_kind, params.forward.key, my_row, seqlen_kv, part,
                         params.forward.head_dim, of_keys, at);
    if (wants_dk || has_qv)
        load_rows<T>(v, value, value_kind, params.forward.value, my_row, seqlen_kv, part,
                     params.forward.head_dim_v, at);

    // Which queries see the keys: of the threadgroup's they say which tiles it reads, of a simdgroup's
    // whether a tile is hidden, whole or mixed for it.
    const Visible<int> range = visible_of(params.forward, sequence);
    const Visible<int> by = seers(range, seqlen_q);
    const int last_row = min(first_row + BLOCK, seqlen_kv) - 1;
    const SeenBounds<int> block = seer_bounds(by, range.prefix, first_row, last_row);
    const SeenBounds<int> mine =
        seer_bounds(by, range.prefix, my_row, min(my_row + 8 * ROWS, seqlen_kv) - 1);
    const int tiles_begin = block.some_begin / TILE * TILE;
    const bool hides =
        has_mask || !covers(block, tiles_begin, max(block.some_end - tiles_begin, 0));
    const float unit = scale_last ? params.forward.score_scale : 1.0f;
    const int heads_end = (head_kv + 1) * params.forward.group;
    if (wants_dk)
        dk = moved_gradient<T>(dk, dk_kind,
                               sequence.kv_batch * params.dk.batch +
                                   sequence.kv_row * params.dk.row + head_kv * params.dk.head);
    if (wants_dv)
        dv = moved_gradient<T>(dv, dv_kind,
                               sequence.kv_batch * params.dv.batch +
                                   sequence.kv_row * params.dv.row + head_kv * params.dv.head);
    // One pass, unless it meets NaN or infinities where queries are hidden. Then pass 1 has the
    // finite results, and passes 2 and 3 add +inf and -inf to dV (gradients.h).
    for (int pass = hides ? 0 : -1;; ++pass) {
        clear(k_sum);
        clear(v_sum);
        for (int head = head_kv * params.forward.group; head < heads_end; ++head) {
            device const uchar* own_query =
                first_query<T>(query, query_kind, params.forward.query, sequence, head);
            device const uchar* own_dout =
                first_query<T>(dout, dout_kind, params.dout, sequence, head);
            device const uchar* own_qv = qv;
            if (has_qv) own_qv = first_query<T>(qv, query_kind, params.forward.qv, sequence, head);
            device const float2* own_statistics =
                statistics + statistics_before(params.statistics, sequence, head);
            ScoreRow rows[ROWS];
#pragma clang loop unroll(full)
            for (int f = 0; f < ROWS; ++f)
                rows[f] = score_row_of_key(params.forward, slopes, batch, head,
                                           my_row + f * 8 + at.row, seqlen_kv, range.offset);
            for (int q0 = tiles_begin; q0 < block.some_end; q0 += TILE) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (!ONE_TILE)
                    stage_rotated_rows<E, T, D, TILE, THREADS>(
                        q_tile, own_query, query_kind, params.forward.query, q0, seqlen_q,
                        params.forward.head_dim, of_queries, thread_index);
                Fragment<float> s[ROWS][QF], dp[ROWS][QF];
                clear(s);
                clear(dp);
                const bool sees = my_row < seqlen_kv && touches(mine, q0, TILE);
                if (has_qv) {  // in the place of dO
                    stage_rows<E, T, DV, TILE, THREADS>(g_tile, own_qv, query_kind,
                                                        params.forward.qv, q0, seqlen_q,
                                                        params.forward.head_dim_v, thread_index);
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    if (sees) add_products<G_ROW>(s, v, g_tile + part * DVF * 8, at);
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                }
                if (!ONE_TILE || wants_dk || has_qv)
                    stage_rows<E, T, DV, TILE, THREADS>(g_tile, own_dout, dout_kind, params.dout,
                                                        q0, seqlen_q, params.forward.head_dim_v,
                                                        thread_index);
                if (thread_index < TILE)
                    of_row[thread_index] =
                        q0 + thread_index < seqlen_q
                            ? own_statistics[(q0 + thread_index) * params.statistics.row]
                            : float2(0.0f);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (SPLIT == 1 && !sees && pass <= 0 && !has_qv)
                    continue;  // no barrier follows in this tile

                if (sees) {
                    if (!ONE_TILE) add_products<Q_ROW>(s, k, q_tile + part * DF * 8, at);
                    if (wants_dk || has_qv) add_products<G_ROW>(dp, v, g_tile + part * DVF * 8, at);
                }
                if (ONE_TILE) {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    stage_rotated_rows<E, T, D, TILE, THREADS>(
                        q_tile, own_query, query_kind, params.forward.query, q0, seqlen_q,
                        params.forward.head_dim, of_queries, thread_index);
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    if (sees) add_products<Q_ROW>(s, k, q_tile + part * DF * 8, at);
                }
                if (SPLIT > 1) add_two_parts<SPLIT>(s, dp, parts, simdgroup, lane);
                if (pass > 0) {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    guard_rows<TILE, D, Q_ROW, THREADS>(q_tile, 3, thread_index);
                    if (!ONE_TILE)
                        guard_rows<TILE, DV, G_ROW, THREADS>(g_tile, pass == 1 ? 3 : pass - 1,
                                                             thread_index);
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                }
                if (!sees && !has_qv && !(ONE_TILE && wants_dv)) continue;

                const bool mixed = !covers(mine, q0, TILE);
                Fragment<M> p[ROWS][QF];
                Fragment<G> ds[ROWS][QF];
#pragma clang loop unroll(full)
                for (int f = 0; f < ROWS && sees; ++f)
                    key_gradients(p, ds, s, dp, f, rows[f], of_row, batch, head, q0, mixed, by,
                                  range.prefix, unit, params.forward, mask, pass >= 2, at);
                if (ONE_TILE) {  // dK first: dO takes the place of Q
                    if (wants_dk && pass < 2 && sees)
                        accumulate<Q_ROW>(k_sum, ds, q_tile + part * DF * 8, at);
                    const int guard_pass = pass == 1 ? 3 : max(pass - 1, 0);
                    if (wants_dv)
                        restage_rows<E, T, DV, TILE, THREADS>(
                            g_tile, own_dout, dout_kind, params.dout, q0, seqlen_q,
                            params.forward.head_dim_v, guard_pass, thread_index);
                }
                if (wants_dv && sees) accumulate<G_ROW>(v_sum, p, g_tile + part * DVF * 8, at);
                if (!ONE_TILE && wants_dk && pass < 2 && sees)
                    accumulate<Q_ROW>(k_sum, ds, q_tile + part * DF * 8, at);
                if (!has_qv || !wants_dv || pass >= 2) continue;
                restage_rows<E, T, DV, TILE, THREADS>(g_tile, own_qv, query_kind, params.forward.qv,
                                                      q0, seqlen_q, params.forward.head_dim_v,
                                                      pass > 0 ? 3 : 0, thread_index);
                if (!sees) continue;
                scale(ds, params.qv_factor);
                accumulate<G_ROW>(v_sum, ds, g_tile + part * DVF * 8, at);
            }
        }
        if (pass == 0) {
            bool again = false;
            if (wants_dk)
                again =
                    any_spoiled_rows<SIMDGROUPS>(k_sum, my_row, seqlen_kv, votes, thread_index, at);
            if (wants_dv)
                again = any_spoiled_rows<SIMDGROUPS>(v_sum, my_row, seqlen_kv, votes, thread_index,
                                                     at) ||
                        again;
            if (again) continue;
        }
        if (pass >= 2)
            spoil_gradient_rows<T>(dv, dv_kind, params.dv, v_sum, my_row, seqlen_kv, part,
                                   params.forward.head_dim_v, pass == 2, at);
        if (wants_dk && pass < 2)
            store_rotated_rows<T, D, SIMDGROUPS, SPLIT>(
                dk, dk_kind, params.dk, k_sum, reinterpret_cast<threadgroup float*>(q_words),
                first_row, seqlen_kv, params.forward.head_dim, params.score_factor, of_keys,
                thread_index, at);
        if (wants_dv && pass < 2)
            store_gradient_rows<T>(dv, dv_kind, params.dv, v_sum, my_row, seqlen_kv, part,
                                   params.forward.head_dim_v, params.value_factor, at);
        if (pass <= 0 || pass == 3 || !wants_dv) break;
    }
}

#define UMFA_BACKWARD(KERNEL, NAME, ...) \
    template [[host_name(NAME)]] [[kernel]] decltype(KERNEL<__VA_ARGS__>) KERNEL<__VA_ARGS__>;

#ifdef UMFA_KERNEL
// Compiled from text for one problem: the planner names the kernel and its shape. UMFA_OF: which of
// the two.
#ifdef UMFA_OF
UMFA_BACKWARD(UMFA_OF, UMFA_KERNEL, UMFA_T, UMFA_M, UMFA_SHAPE)
#else
UMFA_BACKWARD(umfa_delta, UMFA_KERNEL, UMFA_T)
#endif
#else
// Compiled ahead: every shape that the planner can ask for.
#define UMFA_DQ_NAME(TYPE, D, DV, TILE) "dq_" TYPE "_d" #D "_v" #DV "_k" #TILE
#define UMFA_DKV_NAME(TYPE, D, DV, TILE) "dkv_" TYPE "_d" #D "_v" #DV "_q" #TILE
#define UMFA_DQ_F16(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)            \
    UMFA_BACKWARD(umfa_dq, UMFA_DQ_NAME("f16", D, DV, TILE), half, half, D, DV, TILE, ROWS, \
                  SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DQ_BF16(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)                \
    UMFA_BACKWARD(umfa_dq, UMFA_DQ_NAME("bf16", D, DV, TILE), bfloat, bfloat, D, DV, TILE, ROWS, \
                  SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DQ_F32(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)              \
    UMFA_BACKWARD(umfa_dq, UMFA_DQ_NAME("f32", D, DV, TILE), float, float, D, DV, TILE, ROWS, \
                  SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DQ_BF16_AS_F32(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)         \
    UMFA_BACKWARD(umfa_dq, UMFA_DQ_NAME("bf16_as_f32", D, DV, TILE), bfloat, float, D, DV, TILE, \
                  ROWS, SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DKV_F16(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)             \
    UMFA_BACKWARD(umfa_dkv, UMFA_DKV_NAME("f16", D, DV, TILE), half, half, D, DV, TILE, ROWS, \
                  SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DKV_BF16(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)                 \
    UMFA_BACKWARD(umfa_dkv, UMFA_DKV_NAME("bf16", D, DV, TILE), bfloat, bfloat, D, DV, TILE, ROWS, \
                  SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DKV_F32(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)               \
    UMFA_BACKWARD(umfa_dkv, UMFA_DKV_NAME("f32", D, DV, TILE), float, float, D, DV, TILE, ROWS, \
                  SIMDGROUPS, SPLIT, ONE_TILE)
#define UMFA_DKV_BF16_AS_F32(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)          \
    UMFA_BACKWARD(umfa_dkv, UMFA_DKV_NAME("bf16_as_f32", D, DV, TILE), bfloat, float, D, DV, TILE, \
                  ROWS, SIMDGROUPS, SPLIT, ONE_TILE)
UMFA_DQ_SHAPES_16(UMFA_DQ_F16)
UMFA_DQ_SHAPES_16(UMFA_DQ_BF16)
UMFA_DQ_SHAPES_32(UMFA_DQ_F32)
UMFA_DQ_SHAPES_WIDENED(UMFA_DQ_BF16_AS_F32)
UMFA_DKV_SHAPES_16(UMFA_DKV_F16)
UMFA_DKV_SHAPES_16(UMFA_DKV_BF16)
UMFA_DKV_SHAPES_32(UMFA_DKV_F32)
UMFA_DKV_SHAPES_WIDENED(UMFA_DKV_BF16_AS_F32)
UMFA_BACKWARD(umfa_delta, "delta_f16", half)
UMFA_BACKWARD(umfa_delta, "delta_bf16", bfloat)
UMFA_BACKWARD(umfa_delta, "delta_f32", float)
#endif
