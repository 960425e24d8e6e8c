// Gradients that are sums over rows of queries: those of sinks, of ALiBi slopes, and of a mask with one
// number for all queries and keys.
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/gradients.h"
#include "shared/indices.h"
#include "shared/params.h"
#include "shared/scores.h"

using namespace metal;
using namespace umfa;

/// One threadgroup finds one sum, in an order that its number of threads alone decides. Without
/// sinks `rows` are the terms. With a sink they are the statistics of rows (umfa_delta): as a key
/// whose value is 0 it has dS = -P * D.
template <typename T>
[[kernel]] void umfa_row_sums(
    device const float* rows [[buffer(UMFA_ROW_SUMS_ROWS)]],
    device const uchar* sinks UMFA_BUFFER_IF(UMFA_ROW_SUMS_SINKS, has_sinks),
    device const SequenceParams* sequences UMFA_BUFFER_IF(UMFA_ROW_SUMS_SEQUENCES, has_sequences),
    device T* sums [[buffer(UMFA_ROW_SUMS_SUMS)]],
    constant RowSumsParams& params [[buffer(UMFA_ROW_SUMS_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    threadgroup float parts[32];
    const int first = simdgroup * 32 + lane, first_head = int(group.x) * params.heads;
    const int first_batch = int(group.y) * params.batch;
    float sink = 0.0f;
    if (has_sinks) sink = sink_at(sinks, first_head * params.sink);
    float sum = 0.0f;
    for (int b = first_batch; b < first_batch + params.batch; ++b) {
        int64_t batch = b, first_row = 0;
        int row_count = params.seqlen_q;
        if (has_sequences) {
            batch = sequences[b].query_batch;
            first_row = sequences[b].query_row;
            row_count = sequences[b].seqlen_q;
        }
        for (int head = first_head; head < first_head + params.heads; ++head) {
            device const float* own = rows + batch * params.rows.batch + head * params.rows.head +
                                      first_row * params.rows.row;
            for (int row = first; row < row_count; row += int(threads.x)) {
                device const float* at = own + row * params.rows.row;
                sum += has_sinks ? times_unless_zero(weight(sink, 1.0f, at[0]), at[1]) : at[0];
            }
        }
    }
    sum = simd_sum(sum);
    if (lane == 0) parts[simdgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (first != 0) return;
    float total = 0.0f;
    for (uint i = 0; i < threads.x / 32; ++i) total += parts[i];
    sums[group.y * params.sum_batch + group.x * params.sum_head] = T(total * params.factor);
}

#define UMFA_ROW_SUMS(NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_row_sums<TYPE>) umfa_row_sums<TYPE>;

#ifdef UMFA_KERNEL
UMFA_ROW_SUMS(UMFA_KERNEL, UMFA_T)
#else
UMFA_ROW_SUMS("row_sums_f16", half)
UMFA_ROW_SUMS("row_sums_bf16", bfloat)
UMFA_ROW_SUMS("row_sums_f32", float)
#endif
