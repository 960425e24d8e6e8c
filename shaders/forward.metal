// Forward attention on simdgroup matrices (softmax.h says how exponents are kept in range).
//
// One threadgroup owns BQ queries of one head. Each simdgroup owns 8 * QF rows and keeps their Q, O
// and softmax state in registers; where the channels are too many for that, SPLIT simdgroups share
// a block of rows, each with its share of the channels, and add up their partial scores through
// threadgroup memory. K and V tiles are staged in threadgroup memory once for all simdgroups. A
// lane holds two adjacent columns of a row (fragment.h), for S and P alike, so P feeds P V without
// a move.
//
// Of few queries that the decode kernel does not take, a threadgroup owns BQ rows of a key head: queries
// of all heads that share it (packs_heads), over a part of the keys (splits > 1). decode.metal's merge
// puts the parts together.
//
// Finite arithmetic only: under fast math Metal leaves infinities undefined.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/dropout.h"
#include "shared/forward_shapes.h"
#include "shared/fragment.h"
#include "shared/indices.h"
#include "shared/key_order.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/products.h"
#include "shared/rotary.h"
#include "shared/scores.h"
#include "shared/sequence.h"
#include "shared/softmax.h"
#include "shared/staged.h"
#include "shared/staged_codes.h"
#include "shared/threadgroup_memory.h"
#include "shared/tile.h"
#include "shared/values.h"
#include "shared/visible.h"

using namespace metal;

using namespace umfa;

namespace umfa {

/// What each of a lane's rows is. With packs_heads row n of a key head is query n % seqlen_q of its head
/// n / seqlen_q, and rows past the end repeat the last one.
template <int QF>
struct RowPlaces {
    int head[QF], query[QF];
};

template <int QF>
inline RowPlaces<QF> row_places(int head, int first, int seqlen_q, int row_count, LaneMap at) {
    RowPlaces<QF> places;
#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        const int row = first + f * 8 + at.row;
        const int packed = min(row, row_count - 1);
        places.head[f] = packs_heads ? head + packed / seqlen_q : head;
        places.query[f] = packs_heads ? packed % seqlen_q : row;
    }
    return places;
}

/// Whether a row of the threadgroup holds NaN or an infinity. All threads get the same answer.
template <int SIMDGROUPS, int QF, int DVF>
inline bool any_spoiled(thread Fragment<float> (&o)[QF][DVF], thread const ScoreRow (&rows)[QF],
                        int seqlen_q, threadgroup uint* votes, ushort thread_index) {
    bool mine = false;
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * DVF; ++i)
        mine = mine || (rows[i / DVF].row < seqlen_q && is_spoiled(o[i / DVF][i % DVF]));
    const bool of_simdgroup = simd_any(mine);
    if (thread_index % 32 == 0) votes[thread_index / 32] = of_simdgroup ? 1u : 0u;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint any = 0u;
#pragma clang loop unroll(full)
    for (int i = 0; i < SIMDGROUPS; ++i) any |= votes[i];
    return any != 0u;
}

/// Queries of a simdgroup and their second part, as fragments, and what the scores of their rows
/// need. `query`: the first of the sequence and of head 0.
template <typename T, int QF, int DF, int DVF, typename M>
UMFA_INLINE void load_queries(thread Fragment<M> (&q)[QF][DF], thread Fragment<M> (&qv)[QF][DVF],
                              thread ScoreRow (&rows)[QF], device const uchar* query,
                              device const uchar* query_v, device const float* slopes,
                              constant ForwardParams& params, thread const Rotary& rotary,
                              thread const SequenceParams& sequence, int batch,
                              thread const RowPlaces<QF>& places, int part, LaneMap at) {
    constexpr int APART = Staged<T, M>::APART;
    const int seqlen_q = sequence.seqlen_q;
#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        const int row = places.query[f], head = places.head[f];
        device const uchar* queries = moved<T>(query, query_kind, head * params.query.head);
        rows[f] = score_row(params, slopes, batch, head, row, sequence.visibility.offset);
        const int position = sequence.position_q + row * params.rotary.advance;
#pragma clang loop unroll(full)
        for (int d = 0; d < DF; ++d) {
            const int column = Staged<T, M>::channel(part * DF + d, at.column);
            set(q[f][d],
                any_query_element<M, T>(queries, query_kind, params.query, rotary, position, row,
                                        seqlen_q, column, params.head_dim),
                any_query_element<M, T>(queries, query_kind, params.query, rotary, position, row,
                                        seqlen_q, column + APART, params.head_dim));
        }
        if (has_qv) {
            device const uchar* of_head =
                moved<T>(query_v, query_kind,
                         sequence.query_batch * params.qv.batch +
                             sequence.query_row * params.qv.row + head * params.qv.head);
#pragma clang loop unroll(full)
            for (int d = 0; d < DVF; ++d) {
                const int column = Staged<T, M>::channel(part * DVF + d, at.column);
                set(qv[f][d],
                    any_element<M, T>(of_head, query_kind, params.qv, row, seqlen_q, column,
                                      params.head_dim_v),
                    any_element<M, T>(of_head, query_kind, params.qv, row, seqlen_q, column + APART,
                                      params.head_dim_v));
            }
        }
    }
}

/// Bits of a lane's elements of the mask of row f, which begins at element `row`, for a tile.
template <int QF, int KF>
UMFA_INLINE void load_runs(thread uint2 (&bits)[QF][KF], int f, device const uchar* mask,
                           int64_t row, int k0, int seqlen_kv, LaneMap at) {
    device const uchar* from = mask + row * mask_bytes();
    const int run = run_fragments<KF>(), bytes = 2 * run * mask_bytes();
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        if (j % run != 0) continue;
        // A run behind the last key is hidden, whatever is read for it.
        const int column = min(k0 + key_column<KF>(j, at.column), (seqlen_kv - 1) & ~(2 * run - 1));
        device const uchar* mine = from + int64_t(column) * mask_bytes();
        uint4 words = uint4(0u);
        if (bytes == 16) words = *reinterpret_cast<device const uint4*>(mine);
        if (bytes == 8) words.xy = *reinterpret_cast<device const uint2*>(mine);
        if (bytes == 4) words.x = *reinterpret_cast<device const uint*>(mine);
        if (mask_kind == UMFA_MASK_F32) {
            bits[f][j] = words.xy;
            bits[f][(j + 1) % KF] = words.zw;
        } else if (mask_kind == UMFA_MASK_BOOL) {
            bits[f][j] = uint2(words.x, 0u);
            bits[f][(j + 1) % KF] = uint2(words.x >> 16, 0u);
            if (run > 2) bits[f][(j + 2) % KF] = uint2(words.y, 0u);
            if (run > 2) bits[f][(j + 3) % KF] = uint2(words.y >> 16, 0u);
        } else {
            bits[f][j] = uint2(words.x, 0u);
            bits[f][(j + 1) % KF] = uint2(words.y, 0u);
            if (run > 2) bits[f][(j + 2) % KF] = uint2(words.z, 0u);
            if (run > 2) bits[f][(j + 3) % KF] = uint2(words.w, 0u);
        }
    }
}

/// A lane's elements of the mask for a tile.
template <int QF, int KF>
UMFA_INLINE void load_mask(thread uint2 (&bits)[QF][KF], thread const ScoreRow (&rows)[QF], int k0,
                           int seqlen_kv, constant ForwardParams& params, device const uchar* mask,
                           LaneMap at) {
    if (mask_runs) {
#pragma clang loop unroll(full)
        for (int f = 0; f < QF; ++f) load_runs(bits, f, mask, rows[f].mask, k0, seqlen_kv, at);
        return;
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * KF; ++i)
        bits[i / KF][i % KF] = mask_bits(mask, rows[i / KF].mask,
                                         k0 + key_column<KF>(i % KF, at.column), seqlen_kv, params);
}

/// Whether scores may begin with the mask, so that the products are added to it and hide the time of its
/// arithmetic: 0.94 of the speed without a bool mask instead of 0.89, and 0.91 with float16's (H200, D =
/// 64, half). `lowest` stays what it is, since products of half are below 1e13. NaN in a hidden key reaches
/// O, and the passes behind the first keep it out.
template <typename M>
inline bool can_start_masked() {
    return has_mask && scale_last && is_same_v<M, half>;
}

/// Scores of one row in a tile with all that depends on positions, and `lowest` for hidden keys.
/// `mixed`: the tile holds keys that some row must not see. `is_masked`: the mask is in the scores.
template <int QF, int KF>
UMFA_INLINE void mask_tile(thread Fragment<float> (&s)[QF][KF], int f, thread const ScoreRow& row,
                           int k0, bool mixed, int pass, Visible<int> range,
                           constant ForwardParams& params, thread uint2 (&mask)[QF][KF],
                           bool is_masked, float scale, float mask_unit, LaneMap at) {
    const bool counting = counts(pass);
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        const int column = k0 + key_column<KF>(j, at.column);
        const float2 x = pair_of(s[f][j]);
        set(s[f][j], biased(x.x, row, column, scale, params),
            biased(x.y, row, column + 1, scale, params));
    }
    if (has_mask && !is_masked) {
#pragma clang loop unroll(full)
        for (int j = 0; j < KF; ++j)
            set_pair(s[f][j], masked(pair_of(s[f][j]), mask[f][j], mask_unit));
    }
    if (has_mask && is_masked && pass > 0) {  // NaN in a hidden key
#pragma clang loop unroll(full)
        for (int j = 0; j < KF; ++j)
            set_pair(s[f][j], hidden_again(pair_of(s[f][j]), mask[f][j], mask_unit));
    }
    if (mixed || counting) {  // few tiles need this, so the branch is cheap
        const VisibleRow seen = whole_row(range, row.row);
#pragma clang loop unroll(full)
        for (int j = 0; j < KF; ++j) {
            const int column = k0 + key_column<KF>(j, at.column);
            const float2 x = pair_of(s[f][j]);
            set(s[f][j], sees(seen, column) ? x.x : lowest, sees(seen, column + 1) ? x.y : lowest);
        }
        if (counting) set_seen(s, f);
    }
}

/// Weights P of one row in a tile. The row's O follows where the reference moves.
template <int QF, int KF, int DVF, typename M>
UMFA_INLINE void softmax_tile(thread Fragment<M> (&p)[QF][KF], thread Fragment<float> (&o)[QF][DVF],
                              thread SoftmaxRow& softmax, thread Fragment<float> (&s)[QF][KF],
                              int f, int batch, int head, int row, int k0, int pass, float unit,
                              constant ForwardParams& params, LaneMap at) {
    float top = lowest;
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        const float2 x = pair_of(s[f][j]);
        top = max(top, max(x.x, x.y));
    }
    if (must_follow(softmax, top, unit)) {
        const float factor = follow(softmax, top, unit);
#pragma clang loop unroll(full)
        for (int d = 0; d < DVF; ++d) set_pair(o[f][d], pair_of(o[f][d]) * factor);
    }
    const float relative_to = base(softmax);
    Philox words;
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        const float2 x = pair_of(s[f][j]);
        float p0 = weight(x.x, unit, relative_to);
        float p1 = weight(x.y, unit, relative_to);
        softmax.sum += p0 + p1;
        if (has_dropout) {
            const int column = k0 + key_column<KF>(j, at.column);
            const bool alone = KF == 1 || mask_runs;  // else two fragments share the words
            if (alone || j % 2 == 0) words = words_of(params.dropout, batch, head, row, column);
            drop(p0, p1, words, alone ? column / 8 % 2 != 0 : j % 2 != 0,
                 threshold_of(params.dropout, pass));
        }
        set(p[f][j], M(p0), M(p1));
    }
}

/// What a split found of a row: O as it is, and the softmax state.
template <int QF, int DVF>
UMFA_INLINE void store_part(device float* partial_out, device float2* partial_state, int64_t to,
                            thread Fragment<float> (&o)[QF][DVF], int f,
                            thread const SoftmaxRow& softmax, int columns, int part, LaneMap at) {
#pragma clang loop unroll(full)
    for (int d = 0; d < DVF; ++d) {
        const int column = (part * DVF + d) * 8 + at.column;
        const float2 x = pair_of(o[f][d]);
        if (column < columns) partial_out[to * columns + column] = x.x;
        if (column + 1 < columns) partial_out[to * columns + column + 1] = x.y;
    }
    if (part == 0 && at.column == 0) partial_state[to] = float2(softmax.reference, softmax.sum);
}

/// A row of O, divided by its sum, and its log-sum-exp. `out`: the first row of the sequence and head.
template <typename T, int QF, int DVF>
UMFA_INLINE void store_row(device uchar* out, device float* lse, device const uchar* sinks,
                           thread Fragment<float> (&o)[QF][DVF], int f, thread SoftmaxRow& softmax,
                           int row, constant ForwardParams& params,
                           thread const SequenceParams& sequence, int head, int part, LaneMap at) {
    const float inverse = finish(softmax, sinks, head * params.sink, params.dropout.factor);
#pragma clang loop unroll(full)
    for (int d = 0; d < DVF; ++d) {
        const int column = (part * DVF + d) * 8 + at.column;
        const float2 x = pair_of(o[f][d]) * inverse;
        device uchar* to =
            moved<T>(out, out_kind, row * params.out.row + column * channel_stride(params.out));
        if (column < params.head_dim_v) store_any<T>(to, out_kind, 0, x.x);
        if (column + 1 < params.head_dim_v)
            store_any<T>(to, out_kind, channel_stride(params.out), x.y);
    }
    if (has_lse && part == 0 && at.column == 0)
        lse[sequence.query_batch * params.lse.batch + head * params.lse.head +
            (sequence.query_row + row) * params.lse.row] =
            log_sum_exp(softmax.reference, softmax.sum);
}

}  // namespace umfa

/// Long, since threadgroup memory is declared in kernels alone and a tile's scores and staging share
/// their barriers.
template <typename T, typename M, int D, int DV, int BK, int QF, int SIMDGROUPS, int SPLIT,
          bool ONE_TILE, int FENCES>
[[kernel, max_total_threads_per_threadgroup(32 * SIMDGROUPS)]] void umfa_forward(
    device const uchar* query [[buffer(UMFA_FORWARD_QUERY)]],
    device const uchar* key [[buffer(UMFA_FORWARD_KEY)]],
    device const uchar* value [[buffer(UMFA_FORWARD_VALUE)]],
    device uchar* out [[buffer(UMFA_FORWARD_OUT)]],
    device float* lse UMFA_BUFFER_IF(UMFA_FORWARD_LSE, has_lse),
    device const uchar* mask UMFA_BUFFER_IF(UMFA_FORWARD_MASK, has_mask),
    device const float* slopes UMFA_BUFFER_IF(UMFA_FORWARD_SLOPES, has_alibi),
    device const uchar* sinks UMFA_BUFFER_IF(UMFA_FORWARD_SINKS, has_sinks),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_FORWARD_SEQUENCES, has_sequences),
    device const SequenceTask* tasks UMFA_BUFFER_IF(UMFA_FORWARD_TASKS, has_sequences),
    device const int* page_table UMFA_BUFFER_IF(UMFA_FORWARD_PAGES, has_pages),
    device const uchar* rotary_cos UMFA_BUFFER_IF(UMFA_FORWARD_ROTARY_COS, has_rotary),
    device const uchar* rotary_sin UMFA_BUFFER_IF(UMFA_FORWARD_ROTARY_SIN, has_rotary),
    device const uchar* query_v UMFA_BUFFER_IF(UMFA_FORWARD_QV, has_qv),
    device const SplitParams* split_params UMFA_BUFFER_IF(UMFA_FORWARD_SPLIT, packs_heads),
    device float* partial_out UMFA_BUFFER_IF(UMFA_FORWARD_PARTIAL_OUT, packs_heads),
    device float2* partial_state UMFA_BUFFER_IF(UMFA_FORWARD_PARTIAL_STATE, packs_heads),
    device const uchar* key_scales UMFA_BUFFER_IF(UMFA_FORWARD_KEY_SCALES, has_key_scales),
    device const uchar* key_offsets UMFA_BUFFER_IF(UMFA_FORWARD_KEY_OFFSETS, has_key_offsets),
    device const uchar* value_scales UMFA_BUFFER_IF(UMFA_FORWARD_VALUE_SCALES, has_value_scales),
    device const uchar* value_offsets UMFA_BUFFER_IF(UMFA_FORWARD_VALUE_OFFSETS, has_value_offsets),
    device const ForwardCodes* code_params UMFA_BUFFER_IF(UMFA_FORWARD_CODES, has_codes),
    constant ForwardParams& params [[buffer(UMFA_FORWARD_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    constexpr int THREADS = 32 * SIMDGROUPS, BQ = 8 * QF * SIMDGROUPS / SPLIT;
    constexpr int KF = BK / 8, DF = D / SPLIT / 8, DVF = DV / SPLIT / 8;  // fragments
    using E = typename Staged<T, M>::Type;
    constexpr int K_ROW = tile_row<E>(D), V_ROW = tile_row<E>(DV);
    constexpr int FLAGS = forward_flags(DV, QF, SPLIT);
    // Where a thread stages at most 16 bytes of K and of V, a tile's mask is loaded with them: 0.90 of the
    // speed without a float16 mask instead of 0.85 (H200, D = 64). Else it would take registers from V,
    // some of whose loads then wait for the barrier (ptxas, D = 128), and the products of Q K hide the
    // time of its loads. After Q K nothing does: 0.81 to 0.87 (D = 128).
    constexpr bool MASK_FIRST = BK * (D + DV) * int(sizeof(E)) <= 32 * THREADS;
    threadgroup uint4 k_words[tile_words(BK, D, sizeof(E))];
    threadgroup uint4 v_words[second_tile_words(BK, DV, ONE_TILE, sizeof(E))];
    threadgroup float2 parts[forward_parts(BK, QF, SIMDGROUPS, SPLIT)];
    threadgroup uint votes[SIMDGROUPS];
    threadgroup uint flags[2 * FLAGS * THREADS];
    threadgroup int first_tile[forward_first_tile()];
    threadgroup E* k_tile = reinterpret_cast<threadgroup E*>(k_words);
    threadgroup E* v_tile = ONE_TILE ? k_tile : reinterpret_cast<threadgroup E*>(v_words);

    group = place_in_grid(group, params);
    const LaneMap at = lane_map(lane);
    const ushort thread_index = simdgroup * 32 + lane;
    int head = group.y, head_kv = head / params.group;
    int batch = group.z, first_row = group.x * BQ, split = group.x;
    if (has_sequences) {
        batch = tasks[group.x].sequence;
        first_row = tasks[group.x].first_row;
        split = tasks[group.x].split;
        if (has_device_tables && batch < 0) return;  // more threadgroups than tasks
    }
    const SequenceParams sequence = sequence_at(params, sequences, batch);
    const int seqlen_q = sequence.seqlen_q, seqlen_kv = sequence.visibility.seqlen_kv;
    const int row_count = packs_heads ? params.group * seqlen_q : seqlen_q;
    if (packs_heads) {
        const int row_blocks = has_sequences ? 1 : (row_count + BQ - 1) / BQ;
        head_kv = int(group.y) / row_blocks;
        head = head_kv * params.group;
        if (!has_sequences) first_row = int(group.y) % row_blocks * BQ;
    }
    const int my_row = first_row + simdgroup / SPLIT * 8 * QF;
    const int part = simdgroup % SPLIT;

    // The threadgroup's rows say which tiles it reads, a simdgroup's whether a tile is hidden, whole
    // or mixed for it.
    const Visible<int> range = visible_of(params, sequence);
    // Packed rows are of all queries.
    const int first_query = packs_heads ? 0 : first_row;
    const int last_query = packs_heads ? seqlen_q - 1 : min(first_row + BQ, seqlen_q) - 1;
    int split_begin = 0, tiles_end = span_end(range, last_query);
    if (packs_heads) {
        // A multiple of BK.
        const int keys = has_device_tables ? tasks[group.x].keys : split_params->keys_per_split;
        split_begin = span_begin(range, 0) / BK * BK + split * keys;
        tiles_end = min(tiles_end, split_begin + keys);
    }
    const int tiles_begin = next_tile(range, first_query, last_query, split_begin, BK);

    query =
        moved<T>(query, query_kind,
                 sequence.query_batch * params.query.batch + sequence.query_row * params.query.row);
    key = first_key<T>(key, key_kind, params.key, sequence, head_kv);
    value = first_key<T>(value, value_kind, params.value, sequence, head_kv);
    key = rotates_keys ? carried<T>(key, key_kind, params.key, tiles_begin)
                       : first_rows<T, D, BK, THREADS>(key, key_kind, params.key, tiles_begin,
                                                       params.head_dim, thread_index);
    value = first_rows<T, DV, BK, THREADS>(value, value_kind, params.value, tiles_begin,
                                           params.head_dim_v, thread_index);
    const Pages pages = pages_of(params, page_table, sequence);
    Codes of_keys, of_values;
    if (key_codes != 0)
        of_keys = codes_of(key_scales, key_offsets, &code_params->key, unpacked_kind(key_codes),
                           sequence, head_kv);
    if (value_codes != 0)
        of_values = codes_of(value_scales, value_offsets, &code_params->value,
                             unpacked_kind(value_codes), sequence, head_kv);
    const Rotary rotary = rotary_of(params.rotary, rotary_cos, rotary_sin);
    out = moved<T>(out, out_kind,
                   sequence.query_batch * params.out.batch + sequence.query_row * params.out.row +
                       head * params.out.head);

    Fragment<M> q[QF][DF], qv[QF][DVF];
    Fragment<float> o[QF][DVF];
    SoftmaxRow softmax[QF];
    ScoreRow rows[QF];
    const RowPlaces<QF> places = row_places<QF>(head, my_row, seqlen_q, row_count, at);
    load_queries<T>(q, qv, rows, query, query_v, slopes, params, rotary, sequence, batch, places,
                    part, at);

    const SeenBounds<int> mine =
        seen_bounds(range, packs_heads ? 0 : my_row,
                    packs_heads ? last_query : min(my_row + 8 * QF, seqlen_q) - 1);
    const int staged_end = min((tiles_end + BK - 1) / BK * BK, seqlen_kv);
    const bool hides = has_mask || !covers(seen_bounds(range, first_query, last_query), tiles_begin,
                                           staged_end - tiles_begin);
    const float scale = params.score_scale;  // here, or each tile waits for it
    const float unit = scale_last ? scale : 1.0f, mask_unit = params.mask_unit;

    // The first tile of later passes is kept in threadgroup memory. In a register it stays live through
    // pass 0, and the kernel for D = 128 spills (ptxas, sm_90, three threadgroups a multiprocessor: 36
    // bytes).
    if (thread_index == 0) first_tile[0] = tiles_begin;
    // Pass 0 alone, unless it meets NaN or infinities where keys are hidden (values.h).
    int pass = hides ? 0 : -1, from = tiles_begin;
    for (;; ++pass) {
#pragma clang loop unroll(full)
        for (int f = 0; f < QF; ++f) {
            start(softmax[f]);
#pragma clang loop unroll(full)
            for (int d = 0; d < DVF; ++d) set(o[f][d], 0.0f, 0.0f);
        }
        for (int k0 = from; k0 < tiles_end;
             k0 = tile_after(range, first_query, last_query, k0, BK)) {
            uint2 mask_words[QF][KF];
            if (has_mask && MASK_FIRST)
                load_mask(mask_words, rows, k0, seqlen_kv, params, mask, at);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            key = stage_keys<E, T, D, BK, THREADS>(k_tile, key, of_keys, params, pages, k0,
                                                   seqlen_kv - k0, rotary, thread_index);
            if (!ONE_TILE)
                value = stage_values<E, T, DV, BK, THREADS>(v_tile, value, of_values, params, pages,
                                                            k0, seqlen_kv - k0, thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const bool sees = my_row < row_count && touches(mine, k0, BK);
            // In pass 0 with SPLIT 1 no barrier follows in this tile, so the simdgroup may skip it.
            if (SPLIT == 1 && !sees && pass <= 0) continue;

            if (has_mask && !MASK_FIRST)
                load_mask(mask_words, rows, k0, seqlen_kv, params, mask, at);
            Fragment<float> s[QF][KF];
#pragma clang loop unroll(full)
            for (int i = 0; i < QF * KF; ++i) set(s[i / KF][i % KF], 0.0f, 0.0f);
            const bool starts_masked = MASK_FIRST && can_start_masked<M>();
            if (starts_masked && part == 0) {
#pragma clang loop unroll(full)
                for (int i = 0; i < QF * KF; ++i)
                    set_pair(s[i / KF][i % KF],
                             masked(float2(0.0f), mask_words[i / KF][i % KF], mask_unit));
            }
            if (sees) add_products<K_ROW, FENCES>(s, q, k_tile + part * DF * 8, at);
            if (ONE_TILE && has_qv) {
                threadgroup_barrier(mem_flags::mem_threadgroup);  // K has been read
                value = stage_values<E, T, DV, BK, THREADS>(v_tile, value, of_values, params, pages,
                                                            k0, seqlen_kv - k0, thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            if (has_qv && sees) add_products<V_ROW, FENCES>(s, qv, v_tile + part * DVF * 8, at);
            if (SPLIT > 1) add_parts<SPLIT>(s, parts, simdgroup, lane);
            if (ONE_TILE && !has_qv) {
                value = stage_values<E, T, DV, BK, THREADS>(v_tile, value, of_values, params, pages,
                                                            k0, seqlen_kv - k0, thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            if (pass > 0) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                guard_rows<BK, DV, V_ROW, THREADS>(v_tile, pass, thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            if (!sees) continue;

            const bool mixed = !covers(mine, k0, BK);
            Fragment<M> p[QF][KF];
#pragma clang loop unroll(full)
            for (int f = 0; f < QF; ++f) {
                mask_tile(s, f, rows[f], k0, mixed, pass, range, params, mask_words, starts_masked,
                          scale, mask_unit, at);
                softmax_tile(p, o, softmax[f], s, f, batch, places.head[f], rows[f].row, k0, pass,
                             unit, params, at);
            }
            accumulate<V_ROW, FENCES>(o, p, v_tile + part * DVF * 8, at);
        }
        if (pass == 3 || pass < 0) break;
        if (pass > 0)
            count_spoiled<THREADS>(flags + (pass - 1) * FLAGS * THREADS + thread_index, o);
        else if (!any_spoiled<SIMDGROUPS>(o, rows, seqlen_q, votes, thread_index))
            break;
        threadgroup_barrier(mem_flags::mem_threadgroup);  // keeps the load here
        from = first_tile[0];
        // Pointers are behind the last whole tile.
        const int64_t read = max(staged_end / BK * BK - from, 0);
        key = carried<T>(key, key_kind, params.key, -read);
        value = carried<T>(value, value_kind, params.value, -read);
    }
    if (pass > 0) spoil<THREADS>(o, flags + thread_index, flags + FLAGS * THREADS + thread_index);

#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        softmax[f].sum = total(softmax[f]);
        if (my_row + f * 8 + at.row >= row_count) continue;
        const int row = rows[f].row, own_head = places.head[f];
        if (packs_heads && split_params->splits > 1) {
            int64_t to = ((batch * int64_t(split_params->heads) + own_head) * seqlen_q + row) *
                         split_params->splits;
            if (has_sequences)
                to = sequence.part + int64_t(own_head * seqlen_q + row) * sequence.splits;
            store_part(partial_out, partial_state, to + split, o, f, softmax[f], params.head_dim_v,
                       part, at);
            continue;
        }
        store_row<T>(moved<T>(out, out_kind, (own_head - head) * params.out.head), lse, sinks, o, f,
                     softmax[f], row, params, sequence, own_head, part, at);
    }
}

#define UMFA_FORWARD(NAME, ...) \
    template [[host_name(       \
        NAME)]] [[kernel]] decltype(umfa_forward<__VA_ARGS__>) umfa_forward<__VA_ARGS__>;

#ifdef UMFA_KERNEL
// Compiled from text for one problem: the planner names the kernel and its shape.
UMFA_FORWARD(UMFA_KERNEL, UMFA_T, UMFA_M, UMFA_SHAPE)
#else
// Compiled ahead: every shape that the planner can ask for. Alternatives are named by all that differs.
#define UMFA_NAME(TYPE, D, DV, BK) "forward_" TYPE "_d" #D "_v" #DV "_k" #BK
#define UMFA_OTHER(TYPE, D, DV, BK, QF, FENCES) UMFA_NAME(TYPE, D, DV, BK) "_q" #QF "_f" #FENCES
#define UMFA_F16(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)           \
    UMFA_FORWARD(UMFA_NAME("f16", D, DV, BK), half, half, D, DV, BK, QF, SIMDGROUPS, SPLIT, \
                 ONE_TILE, FENCES)
#define UMFA_BF16(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)               \
    UMFA_FORWARD(UMFA_NAME("bf16", D, DV, BK), bfloat, bfloat, D, DV, BK, QF, SIMDGROUPS, SPLIT, \
                 ONE_TILE, FENCES)
#define UMFA_F32(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)             \
    UMFA_FORWARD(UMFA_NAME("f32", D, DV, BK), float, float, D, DV, BK, QF, SIMDGROUPS, SPLIT, \
                 ONE_TILE, FENCES)
#define UMFA_BF16_AS_F32(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)       \
    UMFA_FORWARD(UMFA_NAME("bf16_as_f32", D, DV, BK), bfloat, float, D, DV, BK, QF, SIMDGROUPS, \
                 SPLIT, ONE_TILE, FENCES)
UMFA_FORWARD_SHAPES_16(UMFA_F16)
UMFA_FORWARD_SHAPES_16(UMFA_BF16)
UMFA_FORWARD_SHAPES_32(UMFA_F32)
UMFA_FORWARD_SHAPES_WIDENED(UMFA_BF16_AS_F32)
#define UMFA_OTHER_F16(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)           \
    UMFA_FORWARD(UMFA_OTHER("f16", D, DV, BK, QF, FENCES), half, half, D, DV, BK, QF, SIMDGROUPS, \
                 SPLIT, ONE_TILE, FENCES)
#define UMFA_OTHER_BF16(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)   \
    UMFA_FORWARD(UMFA_OTHER("bf16", D, DV, BK, QF, FENCES), bfloat, bfloat, D, DV, BK, QF, \
                 SIMDGROUPS, SPLIT, ONE_TILE, FENCES)
#define UMFA_OTHER_F32(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST) \
    UMFA_FORWARD(UMFA_OTHER("f32", D, DV, BK, QF, FENCES), float, float, D, DV, BK, QF, \
                 SIMDGROUPS, SPLIT, ONE_TILE, FENCES)
#define UMFA_OTHER_BF16_AS_F32(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)  \
    UMFA_FORWARD(UMFA_OTHER("bf16_as_f32", D, DV, BK, QF, FENCES), bfloat, float, D, DV, BK, QF, \
                 SIMDGROUPS, SPLIT, ONE_TILE, FENCES)
UMFA_FORWARD_ALTERNATIVES_16(UMFA_OTHER_F16)
UMFA_FORWARD_ALTERNATIVES_16(UMFA_OTHER_BF16)
UMFA_FORWARD_ALTERNATIVES_32(UMFA_OTHER_F32)
UMFA_FORWARD_ALTERNATIVES_WIDENED(UMFA_OTHER_BF16_AS_F32)
#endif
