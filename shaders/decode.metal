// Decode: attention of few queries (a token, or a few speculated ones) over many keys, where time
// goes into reading K and V. The keys are split among threadgroups, and `decode_merge` merges what
// they found (flash-decoding, Dao et al. 2023).
//
// The rows of one threadgroup are all queries of all query heads that share a key head, so K and V
// are read once for the whole group. They go straight from device memory into fragments, 16 bytes a
// lane: nothing says that fragment d must hold channels 8 d to 8 d + 7. A product over channels is
// the same in any order that Q and K agree on, and the columns of O may lie in any order that the
// store knows. The order chosen is the one in which a lane's elements of all fragments are
// neighbours in memory.
//
// Each simdgroup goes through every SIMDGROUPS-th run of 8 keys, alone; they merge at the end.
//
// decode_vector.metal has the kernel for a key head with a single row.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/decode_rows.h"
#include "shared/decode_shapes.h"
#include "shared/dropout.h"
#include "shared/fragment.h"
#include "shared/indices.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/rotary.h"
#include "shared/scores.h"
#include "shared/sequence.h"
#include "shared/softmax.h"
#include "shared/threadgroup_memory.h"
#include "shared/values.h"
#include "shared/visible.h"

using namespace metal;

using namespace umfa;

namespace umfa {

/// Channel that fragment d of V and O has in its column.
template <typename T, int DV>
inline int value_channel(int d, int column) {
    const int chunk = chunk_of<T>(DV / 4, value_codes);
    const int nth = d * 2 + column % 2;  // of this lane's channels
    return (nth / chunk * 4 + column / 2) * chunk + nth % chunk;
}

/// Scores of 8 keys. B(channel, key) of K takes two keys a lane.
template <int QF, int DF, int Q_FRAGMENTS, typename M>
UMFA_INLINE void score_tile(thread Fragment<float> (&s)[QF],
                            thread Fragment<M> (&q)[QF][Q_FRAGMENTS],
                            threadgroup const float2* parked_q, thread const M (&k0_row)[DF],
                            thread const M (&k1_row)[DF], uint lane) {
    constexpr bool Q_STAYS = Q_FRAGMENTS == DF;
#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) set(s[f], 0.0f, 0.0f);
#pragma clang loop unroll(full)
    for (int d = 0; d < DF; ++d) {
        Fragment<M> b;
        set(b, k0_row[d], k1_row[d]);
#pragma clang loop unroll(full)
        for (int f = 0; f < QF; ++f) {
            if (!Q_STAYS) {
                const float2 parked = parked_q[(f * DF + d) * 32 + lane];
                set(q[f][0], M(parked.x), M(parked.y));
            }
            simdgroup_multiply_accumulate(s[f], q[f][Q_STAYS ? d : 0], b, s[f]);
        }
    }
}

/// A lane's weights of one row, before dropout. The row's O follows where the reference moves.
template <int QF, int DVF>
UMFA_INLINE float2 softmax_tile(thread Fragment<float> (&o)[QF][DVF], int f,
                                thread SoftmaxRow& softmax, float2 x, float unit) {
    const float top = max(x.x, x.y);
    if (must_follow(softmax, top, unit)) {
        const float factor = follow(softmax, top, unit);
#pragma clang loop unroll(full)
        for (int d = 0; d < DVF; ++d) set_pair(o[f][d], pair_of(o[f][d]) * factor);
    }
    const float relative_to = base(softmax);
    const float p0 = weight(x.x, unit, relative_to), p1 = weight(x.y, unit, relative_to);
    softmax.sum += p0 + p1;
    return float2(p0, p1);
}

/// O += P V of 8 keys. B(key, channel) of V takes one key a lane.
template <bool GUARDED, int QF, int DVF, int ELEMENTS, typename M>
UMFA_INLINE void accumulate(thread Fragment<float> (&o)[QF][DVF], thread Fragment<M> (&p)[QF],
                            thread const M (&v_row)[ELEMENTS], int pass) {
#pragma clang loop unroll(full)
    for (int d = 0; d < DVF; ++d) {
        Fragment<M> b;
        const M v0 = v_row[2 * d], v1 = v_row[2 * d + 1];
        set(b, GUARDED ? guarded(v0, pass) : v0, GUARDED ? guarded(v1, pass) : v1);
#pragma clang loop unroll(full)
        for (int f = 0; f < QF; ++f) simdgroup_multiply_accumulate(o[f][d], p[f], b, o[f][d]);
    }
}

/// Attends to a simdgroup's runs of keys: every SIMDGROUPS-th run from `first` to `end`. GUARDED is
/// for passes 1 to 3 of values.h. They have a body of their own, so that they do not slow down pass 0.
template <bool GUARDED, int D, int SIMDGROUPS, typename T, typename M, int QF, int DVF,
          int Q_FRAGMENTS>
UMFA_INLINE void attend(thread Fragment<float> (&o)[QF][DVF], thread SoftmaxRow (&softmax)[QF],
                        thread Fragment<M> (&q)[QF][Q_FRAGMENTS],
                        threadgroup const float2* parked_q, thread const ScoreRow (&rows)[QF],
                        thread const int (&heads)[QF], device const uchar* key,
                        device const uchar* value, thread const Codes& of_keys,
                        thread const Codes& of_values, device const uchar* mask,
                        constant ForwardParams& params, thread const Pages& pages,
                        Visible<int> range, int last_query, int batch, int first, int end,
                        LaneMap at, uint lane, int pass) {
    constexpr int DF = D / 8;
    const SeenBounds<int> bounds = seen_bounds(range, 0, last_query);
    const float unit = scale_last ? params.score_scale : 1.0f;
#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        start(softmax[f]);
#pragma clang loop unroll(full)
        for (int d = 0; d < DVF; ++d) set(o[f][d], 0.0f, 0.0f);
    }
    key = carried<T>(key, key_kind, params.key, first);
    value = carried<T>(value, value_kind, params.value, first);
    for (int k0 = first; k0 < end; k0 += 8 * SIMDGROUPS) {
        if (has_prefix && !touches(bounds, k0, 8)) continue;  // between prefix and window
        M k0_row[DF], k1_row[DF], v_row[2 * DVF];
        load_row<T, 8>(k0_row, key, key_kind, key_codes, of_keys, params.key, pages, k0, at.column,
                       end - k0, at.row, params.head_dim);
        load_row<T, 8>(k1_row, key, key_kind, key_codes, of_keys, params.key, pages, k0,
                       at.column + 1, end - k0, at.row, params.head_dim);
        load_row<T, 4>(v_row, value, value_kind, value_codes, of_values, params.value, pages, k0,
                       at.row, end - k0, at.column / 2, params.head_dim_v);
        key = carried<T>(key, key_kind, params.key, 8 * SIMDGROUPS);
        value = carried<T>(value, value_kind, params.value, 8 * SIMDGROUPS);

        Fragment<float> s[QF];
        score_tile(s, q, parked_q, k0_row, k1_row, lane);

        // A split may end inside a run, so its own end bounds what is seen too.
        const bool mixed = end < k0 + 8 || !covers(bounds, k0, 8);
        Fragment<M> p[QF];
#pragma clang loop unroll(full)
        for (int f = 0; f < QF; ++f) {
            const int column = k0 + at.column;
            const float2 x = mask_tile<GUARDED>(pair_of(s[f]), rows[f], column, mixed, end, pass,
                                                range, params, mask);
            const float2 weights = softmax_tile(o, f, softmax[f], x, unit);
            float p0 = weights.x, p1 = weights.y;
            if (has_dropout) {
                const Philox words = words_of(params.dropout, batch, heads[f], rows[f].row, column);
                drop(p0, p1, words, k0 / 8 % 2 != 0,
                     GUARDED ? threshold_of(params.dropout, pass) : params.dropout.threshold);
            }
            set(p[f], M(p0), M(p1));
        }

        accumulate<GUARDED>(o, p, v_row, pass);
    }
}

/// The queries of a block of rows as fragments, or where O leaves them no room, each simdgroup's
/// share in threadgroup memory; and what the scores of their rows need.
template <typename T, int D, int SIMDGROUPS, int QF, int Q_FRAGMENTS, typename M>
UMFA_INLINE void load_queries(thread Fragment<M> (&q)[QF][Q_FRAGMENTS],
                              threadgroup float2* parked_q, thread ScoreRow (&rows)[QF],
                              thread int (&heads)[QF], device const uchar* query,
                              device const float* slopes, constant ForwardParams& params,
                              thread const Rotary& rotary, thread const SequenceParams& sequence,
                              int batch, int head_kv, int first_row, uint simdgroup, uint lane,
                              LaneMap at) {
    constexpr int DF = D / 8;
    constexpr bool Q_STAYS = Q_FRAGMENTS == DF;
    const int seqlen_q = sequence.seqlen_q, row_count = params.group * seqlen_q;
#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        // Row n is query n % seqlen_q of the group's head n / seqlen_q. Those past the end repeat
        // the last one and are not stored.
        const int n = min(first_row + f * 8 + at.row, row_count - 1);
        heads[f] = head_kv * params.group + n / seqlen_q;
        rows[f] =
            score_row(params, slopes, batch, heads[f], n % seqlen_q, sequence.visibility.offset);
        const int position = sequence.position_q + rows[f].row * params.rotary.advance;
        device const uchar* of_head =
            moved<T>(query, query_kind,
                     sequence.query_batch * params.query.batch +
                         sequence.query_row * params.query.row + heads[f] * params.query.head);
#pragma clang loop unroll(full)
        for (int d = 0; d < DF; ++d) {
            if (!Q_STAYS && d % SIMDGROUPS != int(simdgroup)) continue;
            const M first = any_query_element<M, T>(
                of_head, query_kind, params.query, rotary, position, rows[f].row, seqlen_q,
                channel_of<T, D>(d, at.column, key_codes), params.head_dim);
            const M second = any_query_element<M, T>(
                of_head, query_kind, params.query, rotary, position, rows[f].row, seqlen_q,
                channel_of<T, D>(d, at.column + 1, key_codes), params.head_dim);
            if (Q_STAYS)
                set(q[f][Q_STAYS ? d : 0], first, second);
            else
                parked_q[(f * DF + d) * 32 + lane] = float2(float(first), float(second));
        }
    }
}

/// The upper half of the simdgroups hands O and softmax state over to the lower half, until one is
/// left.
template <int SIMDGROUPS, int QF, int DVF>
UMFA_INLINE void merge_simdgroups(thread Fragment<float> (&o)[QF][DVF],
                                  thread SoftmaxRow (&softmax)[QF], threadgroup float2* merged_out,
                                  threadgroup float2* merged_state, uint simdgroup, uint lane) {
    constexpr int HALVINGS = (SIMDGROUPS > 1) + (SIMDGROUPS > 2) + (SIMDGROUPS > 4);
#pragma clang loop unroll(full)
    for (int halving = 0; halving < HALVINGS; ++halving) {
        const int half_count = SIMDGROUPS >> (halving + 1);
        const int slot = simdgroup % half_count;
        threadgroup float2* their_out = merged_out + slot * (QF * DVF * 32) + lane;
        threadgroup float2* their_state = merged_state + slot * (QF * 32) + lane;
        if (int(simdgroup) >= half_count && int(simdgroup) < 2 * half_count) {
#pragma clang loop unroll(full)
            for (int f = 0; f < QF; ++f) {
                their_state[f * 32] = float2(softmax[f].reference, softmax[f].sum);
#pragma clang loop unroll(full)
                for (int d = 0; d < DVF; ++d) their_out[(f * DVF + d) * 32] = pair_of(o[f][d]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (int(simdgroup) < half_count) {
#pragma clang loop unroll(full)
            for (int f = 0; f < QF; ++f) {
                const float2 state = their_state[f * 32];
                float mine, theirs;
                merge(softmax[f], state.x, state.y, mine, theirs);
#pragma clang loop unroll(full)
                for (int d = 0; d < DVF; ++d) {
                    const float2 other = their_out[(f * DVF + d) * 32];
                    set_pair(o[f][d], pair_of(o[f][d]) * mine + other * theirs);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

/// What a split found of a row: O as it is, and the softmax state.
template <typename T, int DV, int QF, int DVF>
UMFA_INLINE void store_part(device float* partial_out, device float2* partial_state, int64_t to,
                            thread Fragment<float> (&o)[QF][DVF], int f,
                            thread const SoftmaxRow& softmax, int columns, LaneMap at) {
    device float* part = partial_out + to * columns;
#pragma clang loop unroll(full)
    for (int d = 0; d < DVF; ++d) {
        const int first = value_channel<T, DV>(d, at.column);
        const int second = value_channel<T, DV>(d, at.column + 1);
        const float2 x = pair_of(o[f][d]);
        if (first < columns) part[first] = x.x;
        if (second < columns) part[second] = x.y;
    }
    if (at.column == 0) partial_state[to] = float2(softmax.reference, softmax.sum);
}

/// A row of O, divided by its sum, and its log-sum-exp.
template <typename T, int DV, int QF, int DVF>
UMFA_INLINE void store_row(device uchar* out, device float* lse, device const uchar* sinks,
                           thread Fragment<float> (&o)[QF][DVF], int f, thread SoftmaxRow& softmax,
                           int head, int row, thread const SequenceParams& sequence,
                           constant ForwardParams& params, LaneMap at) {
    const float inverse = finish(softmax, sinks, head * params.sink, params.dropout.factor);
    device uchar* to = moved<T>(out, out_kind,
                                sequence.query_batch * params.out.batch + head * params.out.head +
                                    (sequence.query_row + row) * params.out.row);
#pragma clang loop unroll(full)
    for (int d = 0; d < DVF; ++d) {
        const int first = value_channel<T, DV>(d, at.column);
        const int second = value_channel<T, DV>(d, at.column + 1);
        const float2 x = pair_of(o[f][d]) * inverse;
        if (first < params.head_dim_v)
            store_any<T>(to, out_kind, first * channel_stride(params.out), x.x);
        if (second < params.head_dim_v)
            store_any<T>(to, out_kind, second * channel_stride(params.out), x.y);
    }
    if (has_lse && at.column == 0)
        lse[sequence.query_batch * params.lse.batch + head * params.lse.head +
            (sequence.query_row + row) * params.lse.row] =
            log_sum_exp(softmax.reference, softmax.sum);
}

}  // namespace umfa

/// Long, since threadgroup memory is declared in kernels alone.
template <typename T, typename M, int D, int DV, int QF, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(32 * SIMDGROUPS)]] void umfa_decode(
    device const uchar* query [[buffer(UMFA_DECODE_QUERY)]],
    device const uchar* key [[buffer(UMFA_DECODE_KEY)]],
    device const uchar* value [[buffer(UMFA_DECODE_VALUE)]],
    device uchar* out [[buffer(UMFA_DECODE_OUT)]],
    device float* lse UMFA_BUFFER_IF(UMFA_DECODE_LSE, has_lse),
    device const uchar* mask UMFA_BUFFER_IF(UMFA_DECODE_MASK, has_mask),
    device const float* slopes UMFA_BUFFER_IF(UMFA_DECODE_SLOPES, has_alibi),
    device const uchar* sinks UMFA_BUFFER_IF(UMFA_DECODE_SINKS, has_sinks),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_DECODE_SEQUENCES, has_sequences),
    device const SequenceTask* tasks UMFA_BUFFER_IF(UMFA_DECODE_TASKS, has_sequences),
    device const int* page_table UMFA_BUFFER_IF(UMFA_DECODE_PAGES, has_pages),
    device const uchar* rotary_cos UMFA_BUFFER_IF(UMFA_DECODE_ROTARY_COS, has_rotary),
    device const uchar* rotary_sin UMFA_BUFFER_IF(UMFA_DECODE_ROTARY_SIN, has_rotary),
    device float* partial_out [[buffer(UMFA_DECODE_PARTIAL_OUT)]],
    device float2* partial_state [[buffer(UMFA_DECODE_PARTIAL_STATE)]],
    device const uchar* key_scales UMFA_BUFFER_IF(UMFA_DECODE_KEY_SCALES, has_key_scales),
    device const uchar* key_offsets UMFA_BUFFER_IF(UMFA_DECODE_KEY_OFFSETS, has_key_offsets),
    device const uchar* value_scales UMFA_BUFFER_IF(UMFA_DECODE_VALUE_SCALES, has_value_scales),
    device const uchar* value_offsets UMFA_BUFFER_IF(UMFA_DECODE_VALUE_OFFSETS, has_value_offsets),
    device const ForwardCodes* code_params UMFA_BUFFER_IF(UMFA_DECODE_CODES, has_codes),
    constant DecodeParams& decode_params [[buffer(UMFA_DECODE_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    constexpr int DF = D / 8, DVF = DV / 8;  // fragments
    constexpr int THREADS = 32 * SIMDGROUPS, FLAGS = decode_flags(DV, QF);
    threadgroup float2 merged_out[decode_merged_out(DV, QF, SIMDGROUPS)];
    threadgroup float2 merged_state[decode_merged_state(QF, SIMDGROUPS)];
    threadgroup uint flags[2 * FLAGS * THREADS];
    threadgroup int first_run[SIMDGROUPS];
    constexpr bool Q_STAYS = decode_q_stays(D, sizeof(M));
    threadgroup float2 parked_q[decode_parked_q(D, QF, sizeof(M))];  // in lane order

    constant ForwardParams& params = decode_params.forward;
    group = place_in_grid(group, params);
    const LaneMap at = lane_map(lane);
    int split = group.x, batch = group.z;
    if (has_sequences) {
        split = tasks[group.x].split;
        batch = tasks[group.x].sequence;
        if (has_device_tables && batch < 0) return;  // more threadgroups than tasks
    }
    const SequenceParams sequence = sequence_at(params, sequences, batch);
    const int seqlen_q = sequence.seqlen_q, row_count = params.group * seqlen_q;  // of a key head
    int head_kv = group.y, first_row = 0;
    if (has_sequences) {
        first_row = tasks[group.x].first_row;
    } else {
        const int row_blocks = (row_count + 8 * QF - 1) / (8 * QF);
        head_kv = group.y / row_blocks;
        first_row = group.y % row_blocks * (8 * QF);
    }

    key = first_key<T>(key, key_kind, params.key, sequence, head_kv);
    value = first_key<T>(value, value_kind, params.value, sequence, head_kv);
    const Pages pages = pages_of(params, page_table, sequence);
    Codes of_keys, of_values;
    if (key_codes != 0)
        of_keys = codes_of(key_scales, key_offsets, &code_params->key, unpacked_kind(key_codes),
                           sequence, head_kv);
    if (value_codes != 0)
        of_values = codes_of(value_scales, value_offsets, &code_params->value,
                             unpacked_kind(value_codes), sequence, head_kv);
    const Rotary rotary = rotary_of(params.rotary, rotary_cos, rotary_sin);

    Fragment<M> q[QF][Q_STAYS ? DF : 1];
    Fragment<float> o[QF][DVF];
    SoftmaxRow softmax[QF];
    ScoreRow rows[QF];
    int heads[QF];
    load_queries<T, D, SIMDGROUPS>(q, parked_q, rows, heads, query, slopes, params, rotary,
                                   sequence, batch, head_kv, first_row, simdgroup, lane, at);
    if (!Q_STAYS) threadgroup_barrier(mem_flags::mem_threadgroup);

    const Visible<int> range = visible_of(params, sequence);
    const int last_query = seqlen_q - 1;
    int first = decode_params.first_key, last = decode_params.last_key;
    if (has_sequences) {
        first = first_key_of(span_begin(range, 0));
        last = span_end(range, last_query);
    }
    const int keys_per_split =
        has_device_tables ? tasks[group.x].keys : decode_params.keys_per_split;
    const int begin = first + split * keys_per_split;
    const int end = min(begin + keys_per_split, last);
    // Behind the last key of a run that is not full, that key is read again, and hidden.
    const bool hides = has_mask || (end - begin) % 8 != 0 ||
                       !covers(seen_bounds(range, 0, last_query), begin, end - begin);
    // Each simdgroup decides for itself whether it must guard.
    if (lane == 0) first_run[simdgroup] = begin + int(simdgroup) * 8;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    attend<false, D, SIMDGROUPS, T>(o, softmax, q, parked_q, rows, heads, key, value, of_keys,
                                    of_values, mask, params, pages, range, last_query, batch,
                                    begin + int(simdgroup) * 8, end, at, lane, 0);
    bool spoils = false;
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * DVF; ++i) spoils = spoils || is_spoiled(o[i / DVF][i % DVF]);
    if (hides && simd_any(spoils)) {
        const int thread_index = simdgroup * 32 + lane;
        for (int pass = 1; pass <= 3; ++pass) {
            attend<true, D, SIMDGROUPS, T>(
                o, softmax, q, parked_q, rows, heads, key, value, of_keys, of_values, mask, params,
                pages, range, last_query, batch, first_run[simdgroup], end, at, lane, pass);
            if (pass < 3)
                count_spoiled<THREADS>(flags + (pass - 1) * FLAGS * THREADS + thread_index, o);
        }
        spoil<THREADS>(o, flags + thread_index, flags + FLAGS * THREADS + thread_index);
    }

#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) softmax[f].sum = total(softmax[f]);
    merge_simdgroups<SIMDGROUPS>(o, softmax, merged_out, merged_state, simdgroup, lane);
    if (simdgroup != 0) return;

#pragma clang loop unroll(full)
    for (int f = 0; f < QF; ++f) {
        if (first_row + f * 8 + at.row >= row_count) continue;
        const int row = rows[f].row;
        if (is_split(decode_params)) {
            const int64_t heads_q = decode_params.heads;
            int64_t to = ((batch * heads_q + heads[f]) * seqlen_q + row) * decode_params.splits;
            if (has_sequences)
                to = sequence.part + int64_t(heads[f] * seqlen_q + row) * sequence.splits;
            to += split;
            store_part<T, DV>(partial_out, partial_state, to, o, f, softmax[f], params.head_dim_v,
                              at);
            continue;
        }
        store_row<T, DV>(out, lse, sinks, o, f, softmax[f], heads[f], row, sequence, params, at);
    }
}

/// One threadgroup merges one row: its simdgroups take every SIMDGROUPS-th split, its lanes the
/// channels, and the parts are added in a fixed order.
template <typename T, int SIMDGROUPS, int PER_LANE>
[[kernel, max_total_threads_per_threadgroup(32 * SIMDGROUPS)]] void umfa_decode_merge(
    device const float* partial_out [[buffer(UMFA_MERGE_PARTIAL_OUT)]],
    device const float2* partial_state [[buffer(UMFA_MERGE_PARTIAL_STATE)]],
    device T* out [[buffer(UMFA_MERGE_OUT)]],
    device float* lse UMFA_BUFFER_IF(UMFA_MERGE_LSE, has_lse),
    device const uchar* sinks UMFA_BUFFER_IF(UMFA_MERGE_SINKS, has_sinks),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_MERGE_SEQUENCES, has_sequences),
    device const SequenceTask* tasks UMFA_BUFFER_IF(UMFA_MERGE_TASKS, has_sequences),
    constant MergeParams& params [[buffer(UMFA_MERGE_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    threadgroup float parts[merge_parts(SIMDGROUPS, PER_LANE)];
    threadgroup float sums[SIMDGROUPS];

    const int head = group.y;
    int splits = params.splits;
    int64_t batch = group.z, row = group.x;
    int64_t from = ((batch * params.heads + head) * params.seqlen_q + row) * splits;
    if (has_sequences) {
        const int index = tasks[group.x].sequence, query = tasks[group.x].first_row;
        if (has_device_tables && index < 0) return;
        const SequenceParams sequence = sequences[index];
        splits = sequence.splits;
        from = sequence.part + int64_t(head * sequence.seqlen_q + query) * splits;
        batch = sequence.query_batch;
        row = sequence.query_row + query;
    }
    partial_out += from * params.head_dim_v;
    partial_state += from;

    // The common reference first, so that the parts can be read side by side, none waiting for
    // another.
    SoftmaxRow softmax;
    start(softmax);
    for (int split = lane; split < splits; split += 32)
        softmax.reference = max(softmax.reference, partial_state[split].x);
    softmax.reference = simd_max(softmax.reference);

    float o[PER_LANE] = {}, sum = 0.0f;
#pragma clang loop unroll_count(4)
    for (int split = simdgroup; split < splits; split += SIMDGROUPS) {
        const float2 state = partial_state[split];
        const float factor = state.x <= lowest ? 0.0f : fast::exp2(state.x - softmax.reference);
        sum += state.y * factor;
#pragma clang loop unroll(full)
        for (int i = 0; i < PER_LANE; ++i) {
            const int column = i * 32 + lane;
            if (column < params.head_dim_v)
                o[i] += partial_out[int64_t(split) * params.head_dim_v + column] * factor;
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE; ++i) parts[(simdgroup * PER_LANE + i) * 32 + lane] = o[i];
    if (lane == 0) sums[simdgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup != 0) return;

#pragma clang loop unroll(full)
    for (int other = 1; other < SIMDGROUPS; ++other) {
        sum += sums[other];
#pragma clang loop unroll(full)
        for (int i = 0; i < PER_LANE; ++i) o[i] += parts[(other * PER_LANE + i) * 32 + lane];
    }
    softmax.sum = sum;
    const float inverse = finish(softmax, sinks, head * params.sink, params.dropout_factor);
    device T* to = out + batch * params.out.batch + head * params.out.head + row * params.out.row;
#pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE; ++i) {
        const int column = i * 32 + lane;
        if (column < params.head_dim_v) to[column * params.out.channel] = T(o[i] * inverse);
    }
    if (has_lse && lane == 0)
        lse[batch * params.lse.batch + head * params.lse.head + row * params.lse.row] =
            log_sum_exp(softmax.reference, softmax.sum);
}

#define UMFA_DECODE(NAME, ...) \
    template [[host_name(      \
        NAME)]] [[kernel]] decltype(umfa_decode<__VA_ARGS__>) umfa_decode<__VA_ARGS__>;
#define UMFA_MERGE(NAME, ...)                                                        \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_decode_merge<__VA_ARGS__>) \
        umfa_decode_merge<__VA_ARGS__>;

#ifdef UMFA_KERNEL
// Compiled from text for one problem: the planner names the kernel and its shape.
#ifdef UMFA_MERGES
UMFA_MERGE(UMFA_KERNEL, UMFA_T, UMFA_SHAPE)
#else
UMFA_DECODE(UMFA_KERNEL, UMFA_T, UMFA_M, UMFA_SHAPE)
#endif
#else
// Compiled ahead: every shape that the planner can ask for.
#define UMFA_NAME(TYPE, D, DV, QF) "decode_" TYPE "_d" #D "_v" #DV "_q" #QF
#define UMFA_F16(D, DV, QF, SIMDGROUPS) \
    UMFA_DECODE(UMFA_NAME("f16", D, DV, QF), half, half, D, DV, QF, SIMDGROUPS)
#define UMFA_BF16(D, DV, QF, SIMDGROUPS) \
    UMFA_DECODE(UMFA_NAME("bf16", D, DV, QF), bfloat, bfloat, D, DV, QF, SIMDGROUPS)
#define UMFA_F32(D, DV, QF, SIMDGROUPS) \
    UMFA_DECODE(UMFA_NAME("f32", D, DV, QF), float, float, D, DV, QF, SIMDGROUPS)
#define UMFA_BF16_AS_F32(D, DV, QF, SIMDGROUPS) \
    UMFA_DECODE(UMFA_NAME("bf16_as_f32", D, DV, QF), bfloat, float, D, DV, QF, SIMDGROUPS)
UMFA_DECODE_SHAPES(UMFA_F16)
UMFA_DECODE_SHAPES(UMFA_BF16)
UMFA_DECODE_SHAPES(UMFA_F32)
UMFA_DECODE_SHAPES(UMFA_BF16_AS_F32)
UMFA_MERGE("decode_merge_f16_d128", half, 8, 4)
UMFA_MERGE("decode_merge_f16_d256", half, 8, 8)
UMFA_MERGE("decode_merge_f16_d512", half, 8, 16)
UMFA_MERGE("decode_merge_bf16_d128", bfloat, 8, 4)
UMFA_MERGE("decode_merge_bf16_d256", bfloat, 8, 8)
UMFA_MERGE("decode_merge_bf16_d512", bfloat, 8, 16)
UMFA_MERGE("decode_merge_f32_d128", float, 8, 4)
UMFA_MERGE("decode_merge_f32_d256", float, 8, 8)
UMFA_MERGE("decode_merge_f32_d512", float, 8, 16)
#endif
