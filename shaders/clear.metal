// Rows of the results that belong to no sequence: between packed ones, and past those in use. All rows,
// where only the GPU knows which: those of sequences are then written again.
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/indices.h"
#include "shared/params.h"
#include "shared/scores.h"

using namespace metal;
using namespace umfa;

/// One threadgroup writes a few rows of one head.
template <typename T>
[[kernel]] void umfa_clear(device T* out [[buffer(UMFA_CLEAR_OUT)]],
                           device float* lse UMFA_BUFFER_IF(UMFA_CLEAR_LSE, has_lse),
                           device const UnusedRows* unused [[buffer(UMFA_CLEAR_ROWS)]],
                           constant ClearParams& params [[buffer(UMFA_CLEAR_PARAMS)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           uint3 threads [[threads_per_threadgroup]],
                           uint3 thread_position [[thread_position_in_threadgroup]]) {
    const int head = group.y, columns = params.head_dim_v, first = thread_position.x;
    int64_t batch = group.z, first_row = int64_t(group.x) * UMFA_CLEARED_ROWS;
    int rows = int(min(int64_t(UMFA_CLEARED_ROWS), params.rows - first_row));
    if (!has_device_tables) {
        batch = unused[group.x].batch;
        first_row = unused[group.x].row;
        rows = unused[group.x].rows;
    }
    out += batch * params.out.batch + head * params.out.head + first_row * params.out.row;
    for (int i = first; i < rows * columns; i += threads.x)
        out[i / columns * params.out.row + i % columns * params.out.channel] = T(0.0f);
    if (has_lse) {
        lse += batch * params.lse.batch + head * params.lse.head + first_row * params.lse.row;
        for (int i = first; i < rows; i += threads.x)
            lse[i * params.lse.row] = as_type<float>(0xff800000u);  // -inf, as bits
    }
}

#define UMFA_CLEAR(NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_clear<TYPE>) umfa_clear<TYPE>;

#ifdef UMFA_KERNEL
UMFA_CLEAR(UMFA_KERNEL, UMFA_T)
#else
UMFA_CLEAR("clear_f16", half)
UMFA_CLEAR("clear_bf16", bfloat)
UMFA_CLEAR("clear_f32", float)
#endif
