// Decode of a single row: a key head with one query head and one query. In decode.metal it would leave
// seven of a fragment's eight rows empty. Eight lanes hold a row of K and of V, and its products are sums
// over them; a lane has two keys of every run of 8. decode.metal's merge puts the splits together.
//
// Keys and values on their way are words of 4 bytes. Variables of 16 bits would be unpacked at the end of
// the block that loads them, which then waits for memory (ptxas). Registers decide how many threadgroups
// are resident (float16, D = 128, sm_90, four on a multiprocessor: none are spilled; 330 bytes with
// variables of 16 bits, 210 with the query in registers instead of threadgroup memory).
#include <metal_simdgroup>
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/decode_rows.h"
#include "shared/decode_shapes.h"
#include "shared/dropout.h"
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

/// Neighbouring elements in a word of 4 bytes.
template <typename M>
struct Packed;
template <>
struct Packed<half> {
    static constexpr constant int PER_WORD = 2;
    static uint of(half first, half second) { return as_type<uint>(half2(first, second)); }
};
template <>
struct Packed<bfloat> {
    static constexpr constant int PER_WORD = 2;
    static uint of(bfloat first, bfloat second) {
        return as_type<ushort>(first) | uint(as_type<ushort>(second)) << 16;
    }
};
template <>
struct Packed<float> {
    static constexpr constant int PER_WORD = 1;
    static uint of(float first, float) { return as_type<uint>(first); }
};

/// Element `nth` of the elements that words hold.
template <typename M, int WORDS>
inline float element_of(thread const uint (&words)[WORDS], int nth) {
    constexpr int PER_WORD = Packed<M>::PER_WORD;
    return float(Unpack<M, M>::get(words[nth / PER_WORD], nth % PER_WORD != 0));
}

/// Rows of the same two keys in each of a lane's runs, run by run. The first run starts at `k0`.
/// `first`: of the two keys in a run. Runs past the end are left as they are.
template <typename T, typename M, int RUNS, int SIMDGROUPS, int PER_LANE, int WORDS>
UMFA_INLINE void load_runs(thread uint (&words)[WORDS], device const uchar* rows, int kind,
                           int packed, thread const Codes& codes, constant OperandStrides& strides,
                           thread const Pages& pages, int k0, int first, int end, int place,
                           int columns) {
    constexpr int PER_WORD = Packed<M>::PER_WORD, PER_ROW = PER_LANE / PER_WORD;
    static_assert(WORDS == RUNS * 2 * PER_ROW, "two rows of each run");
#pragma clang loop unroll(full)
    for (int r = 0; r < RUNS; ++r) {
        const int run = r * 8 * SIMDGROUPS;
        if (end - k0 <= run) break;  // the same for all lanes; `continue` takes 8 registers more
#pragma clang loop unroll(full)
        for (int i = 0; i < 2; ++i) {
            M row[PER_LANE];
            load_row<T, 8>(row, rows, kind, packed, codes, strides, pages, k0, run + first + i,
                           end - k0, place, columns);
#pragma clang loop unroll(full)
            for (int w = 0; w < PER_ROW; ++w)
                words[(2 * r + i) * PER_ROW + w] =
                    Packed<M>::of(row[w * PER_WORD], row[w * PER_WORD + PER_WORD - 1]);
        }
    }
}

/// The products of a lane's query and keys, summed over the lanes of a row. A lane has every eighth pair
/// of `q`, from the first on.
template <typename M, int RUNS, int PER_LANE, int WORDS>
UMFA_INLINE void score_runs(thread float (&s)[2 * RUNS], threadgroup const float2* q,
                            thread const uint (&keys)[WORDS]) {
    // Or a compiler would load the queries before the loop, to keep them in registers.
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
    for (int i = 0; i < 2 * RUNS; ++i) s[i] = 0.0f;
#pragma clang loop unroll(full)
    for (int e = 0; e < PER_LANE; e += 2) {
        const float2 pair = q[e / 2 * 8];
#pragma clang loop unroll(full)
        for (int i = 0; i < 2 * RUNS; ++i) {
            s[i] = fma(pair.x, element_of<M>(keys, i * PER_LANE + e), s[i]);
            s[i] = fma(pair.y, element_of<M>(keys, i * PER_LANE + e + 1), s[i]);
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 2 * RUNS; ++i) {
        s[i] += simd_shuffle_xor(s[i], ushort(1));
        s[i] += simd_shuffle_xor(s[i], ushort(2));
        s[i] += simd_shuffle_xor(s[i], ushort(4));
    }
}

/// The next of a simdgroup's groups of runs in which the row sees keys.
template <int STEP, int KEYS>
UMFA_INLINE int next_runs(int k0, int end, SeenBounds<int> bounds) {
    k0 += STEP;
    while (has_prefix && k0 < end && !touches(bounds, k0, KEYS)) k0 += STEP;
    return k0;
}

/// Attends to a simdgroup's runs of keys. Each lane takes its own two keys of a run. While a group of
/// runs is computed, the next one is on its way.
template <int D, int DV, int SIMDGROUPS, typename T, typename M>
UMFA_INLINE void attend_row(thread float (&o)[DV / 8], thread SoftmaxRow& softmax,
                            threadgroup const float2* q, thread const ScoreRow& row, int head,
                            device const uchar* key, device const uchar* value,
                            thread const Codes& of_keys, thread const Codes& of_values,
                            device const uchar* mask, constant ForwardParams& params,
                            thread const Pages& pages, Visible<int> range, int batch, int begin,
                            int end, uint lane) {
    constexpr int RUNS = vector_runs(D, sizeof(M)), DF = D / 8, DVF = DV / 8;
    constexpr int STEP = 8 * SIMDGROUPS * RUNS, KEYS = STEP - 8 * (SIMDGROUPS - 1);
    const int place = lane % 8, pair = lane / 8 * 2;
    const SeenBounds<int> bounds = seen_bounds(range, 0, 0);
    const float unit = scale_last ? params.score_scale : 1.0f;
    start(softmax);
#pragma clang loop unroll(full)
    for (int e = 0; e < DVF; ++e) o[e] = 0.0f;

    constexpr int V_WORDS = DVF / Packed<M>::PER_WORD;  // of a row
    uint keys[RUNS * 2 * DF / Packed<M>::PER_WORD] = {}, values[RUNS * 2 * V_WORDS] = {};
    int k0 = next_runs<STEP, KEYS>(begin - STEP, end, bounds);
    key = carried<T>(key, key_kind, params.key, k0);
    value = carried<T>(value, value_kind, params.value, k0);
    load_runs<T, M, RUNS, SIMDGROUPS, DF>(keys, key, key_kind, key_codes, of_keys, params.key,
                                          pages, k0, pair, end, place, params.head_dim);
    load_runs<T, M, RUNS, SIMDGROUPS, DVF>(values, value, value_kind, value_codes, of_values,
                                           params.value, pages, k0, pair, end, place,
                                           params.head_dim_v);
    while (k0 < end) {
        float s[2 * RUNS];
        score_runs<M, RUNS, DF>(s, q + place, keys);
        const int next = next_runs<STEP, KEYS>(k0, end, bounds);
        key = carried<T>(key, key_kind, params.key, STEP);
        load_runs<T, M, RUNS, SIMDGROUPS, DF>(keys, key, key_kind, key_codes, of_keys, params.key,
                                              pages, next, pair, end, place, params.head_dim);

        const bool mixed = end < k0 + KEYS || !covers(bounds, k0, KEYS);
        float top = lowest;
#pragma clang loop unroll(full)
        for (int r = 0; r < RUNS; ++r) {
            const int column = k0 + r * 8 * SIMDGROUPS + pair;
            const float2 x = mask_tile<false>(float2(s[2 * r], s[2 * r + 1]), row, column, mixed,
                                              end, 0, range, params, mask);
            s[2 * r] = x.x;
            s[2 * r + 1] = x.y;
            top = max(top, max(x.x, x.y));
        }
        if (mixed || has_mask) {
            // What is hidden must not reach the sum: 0 * NaN is NaN.
#pragma clang loop unroll(full)
            for (int i = 0; i < 2 * RUNS; ++i) {
                const uint kept = kept_bits(s[i] > lowest);
#pragma clang loop unroll(full)
                for (int w = 0; w < V_WORDS; ++w) values[i * V_WORDS + w] &= kept;
            }
        }
        if (must_follow(softmax, top, unit)) {
            const float factor = follow(softmax, simd_max(top), unit);
#pragma clang loop unroll(full)
            for (int e = 0; e < DVF; ++e) o[e] *= factor;
        }
        const float relative_to = base(softmax);
#pragma clang loop unroll(full)
        for (int r = 0; r < RUNS; ++r) {
            float p0 = weight(s[2 * r], unit, relative_to);
            float p1 = weight(s[2 * r + 1], unit, relative_to);
            softmax.sum += p0 + p1;
            if (has_dropout) {
                const int run = k0 + r * 8 * SIMDGROUPS;
                const Philox words = words_of(params.dropout, batch, head, 0, run + pair);
                drop(p0, p1, words, run / 8 % 2 != 0, params.dropout.threshold);
            }
#pragma clang loop unroll(full)
            for (int e = 0; e < DVF; ++e) {
                o[e] = fma(p0, element_of<M>(values, 2 * r * DVF + e), o[e]);
                o[e] = fma(p1, element_of<M>(values, (2 * r + 1) * DVF + e), o[e]);
            }
        }
        value = carried<T>(value, value_kind, params.value, STEP);
        load_runs<T, M, RUNS, SIMDGROUPS, DVF>(values, value, value_kind, value_codes, of_values,
                                               params.value, pages, next, pair, end, place,
                                               params.head_dim_v);
        k0 = next;
    }
    // Over the keys of the run.
    softmax.sum += simd_shuffle_xor(softmax.sum, ushort(8));
    softmax.sum += simd_shuffle_xor(softmax.sum, ushort(16));
#pragma clang loop unroll(full)
    for (int e = 0; e < DVF; ++e) {
        o[e] += simd_shuffle_xor(o[e], ushort(8));
        o[e] += simd_shuffle_xor(o[e], ushort(16));
    }
}

}  // namespace umfa

/// umfa_decode for a key head with a single row, without matrices: of their eight rows one would be in
/// use, and the registers of the others are worth more as keys on their way.
template <typename T, typename M, int D, int DV, int SIMDGROUPS>
[[kernel, max_total_threads_per_threadgroup(32 * SIMDGROUPS)]] void umfa_decode_vector(
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
    constexpr int DF = D / 8, DVF = DV / 8;  // channels of a lane
    // Each simdgroup's copy of the query, until it is done with its keys; then what it found.
    threadgroup float2 rows[SIMDGROUPS * DV / 2];
    threadgroup float* merged_out = reinterpret_cast<threadgroup float*>(rows);
    threadgroup float2 merged_state[SIMDGROUPS];

    constant ForwardParams& params = decode_params.forward;
    group = place_in_grid(group, params);
    int split = group.x, batch = group.z;
    if (has_sequences) {
        split = tasks[group.x].split;
        batch = tasks[group.x].sequence;
        if (has_device_tables && batch < 0) return;  // more threadgroups than tasks
    }
    const int head = group.y, place = lane % 8;
    const SequenceParams sequence = sequence_at(params, sequences, batch);
    key = first_key<T>(key, key_kind, params.key, sequence, head);
    value = first_key<T>(value, value_kind, params.value, sequence, head);
    const Pages pages = pages_of(params, page_table, sequence);
    Codes of_keys, of_values;
    if (key_codes != 0)
        of_keys = codes_of(key_scales, key_offsets, &code_params->key, unpacked_kind(key_codes),
                           sequence, head);
    if (value_codes != 0)
        of_values = codes_of(value_scales, value_offsets, &code_params->value,
                             unpacked_kind(value_codes), sequence, head);
    const Rotary rotary = rotary_of(params.rotary, rotary_cos, rotary_sin);
    device const uchar* of_head =
        moved<T>(query, query_kind,
                 sequence.query_batch * params.query.batch + sequence.query_row * params.query.row +
                     head * params.query.head);
    static_assert(D <= DV, "the query has room where O will be");
    threadgroup float2* q = rows + simdgroup * (DV / 2);
    if (lane < 8) {
#pragma clang loop unroll(full)
        for (int e = 0; e < DF; ++e)
            reinterpret_cast<threadgroup float*>(q + e / 2 * 8 + place)[e % 2] =
                float(any_query_element<M, T>(
                    of_head, query_kind, params.query, rotary, sequence.position_q, 0, 1,
                    channel_of<T, D>(e, place, key_codes), params.head_dim));
    }

    const Visible<int> range = visible_of(params, sequence);
    int first = decode_params.first_key, last = decode_params.last_key;
    if (has_sequences) {
        first = first_key_of(span_begin(range, 0));
        last = span_end(range, 0);
    }
    const int keys_per_split =
        has_device_tables ? tasks[group.x].keys : decode_params.keys_per_split;
    const int begin = first + split * keys_per_split;
    const int end = min(begin + keys_per_split, last);
    const ScoreRow row = score_row(params, slopes, batch, head, 0, sequence.visibility.offset);
    float o[DVF];
    SoftmaxRow softmax;
    attend_row<D, DV, SIMDGROUPS, T, M>(o, softmax, q, row, head, key, value, of_keys, of_values,
                                        mask, params, pages, range, batch,
                                        begin + int(simdgroup) * 8, end, lane);

    simdgroup_barrier(mem_flags::mem_threadgroup);  // the query has been read
    if (lane < 8) {
#pragma clang loop unroll(full)
        for (int e = 0; e < DVF; ++e)
            merged_out[simdgroup * DV + channel_of<T, DV>(e, place, value_codes)] = o[e];
    }
    if (lane == 0) merged_state[simdgroup] = float2(softmax.reference, softmax.sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Each thread merges its channels, all of them the state.
    float factors[SIMDGROUPS];
    softmax.reference = lowest;
    softmax.sum = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < SIMDGROUPS; ++i)
        softmax.reference = max(softmax.reference, merged_state[i].x);
#pragma clang loop unroll(full)
    for (int i = 0; i < SIMDGROUPS; ++i) {
        const float2 state = merged_state[i];
        factors[i] = state.x <= lowest ? 0.0f : fast::exp2(state.x - softmax.reference);
        softmax.sum += state.y * factors[i];
    }
    const SoftmaxRow found = softmax;
    float inverse = 1.0f;
    if (!is_split(decode_params))
        inverse = finish(softmax, sinks, head * params.sink, params.dropout.factor);
    int64_t part = (batch * int64_t(decode_params.heads) + head) * decode_params.splits;
    if (has_sequences) part = sequence.part + int64_t(head) * sequence.splits;
    part += split;
    device uchar* to = moved<T>(out, out_kind,
                                sequence.query_batch * params.out.batch + head * params.out.head +
                                    sequence.query_row * params.out.row);
    const int thread_index = simdgroup * 32 + lane;
    for (int column = thread_index; column < params.head_dim_v; column += 32 * SIMDGROUPS) {
        float x = 0.0f;
#pragma clang loop unroll(full)
        for (int i = 0; i < SIMDGROUPS; ++i) x += merged_out[i * DV + column] * factors[i];
        if (is_split(decode_params))
            partial_out[part * params.head_dim_v + column] = x;
        else
            store_any<T>(to, out_kind, column * channel_stride(params.out), x * inverse);
    }
    if (thread_index != 0) return;
    if (is_split(decode_params))
        partial_state[part] = float2(found.reference, found.sum);
    else if (has_lse)
        lse[sequence.query_batch * params.lse.batch + head * params.lse.head +
            sequence.query_row * params.lse.row] = log_sum_exp(softmax.reference, softmax.sum);
}

#define UMFA_VECTOR(NAME, ...)                                                        \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_decode_vector<__VA_ARGS__>) \
        umfa_decode_vector<__VA_ARGS__>;

#ifdef UMFA_KERNEL
// Compiled from text for one problem: the planner names the kernel and its shape.
UMFA_VECTOR(UMFA_KERNEL, UMFA_T, UMFA_M, UMFA_SHAPE)
#else
// Compiled ahead: every shape that the planner can ask for.
#define UMFA_VECTOR_NAME(TYPE, D, DV) "decode_vector_" TYPE "_d" #D "_v" #DV
#define UMFA_VECTOR_F16(D, DV, SIMDGROUPS) \
    UMFA_VECTOR(UMFA_VECTOR_NAME("f16", D, DV), half, half, D, DV, SIMDGROUPS)
#define UMFA_VECTOR_BF16(D, DV, SIMDGROUPS) \
    UMFA_VECTOR(UMFA_VECTOR_NAME("bf16", D, DV), bfloat, bfloat, D, DV, SIMDGROUPS)
#define UMFA_VECTOR_F32(D, DV, SIMDGROUPS) \
    UMFA_VECTOR(UMFA_VECTOR_NAME("f32", D, DV), float, float, D, DV, SIMDGROUPS)
#define UMFA_VECTOR_BF16_AS_F32(D, DV, SIMDGROUPS) \
    UMFA_VECTOR(UMFA_VECTOR_NAME("bf16_as_f32", D, DV), bfloat, float, D, DV, SIMDGROUPS)
UMFA_VECTOR_SHAPES(UMFA_VECTOR_F16)
UMFA_VECTOR_SHAPES(UMFA_VECTOR_BF16)
UMFA_VECTOR_SHAPES(UMFA_VECTOR_F32)
UMFA_VECTOR_SHAPES(UMFA_VECTOR_BF16_AS_F32)
#endif
