// New rows of keys and values, copied into the caches behind those in use before anything is read.
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/indices.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/rotary.h"
#include "shared/sequence.h"

using namespace metal;

using namespace umfa;

namespace umfa {

/// Where a cache has a key of a sequence.
template <typename T>
inline device uchar* place_of(device uchar* cache, int kind, constant OperandStrides& strides,
                              thread const SequenceParams& sequence, device const int* page_table,
                              int pages, int key) {
    int64_t batch = sequence.kv_batch, row = sequence.kv_row + key;
    if (has_pages) {
        const PageRow<int> at = row_in_pages(int(sequence.kv_row) + key, pages);
        batch = page_table[sequence.pages + at.page];
        row = at.row;
    }
    return moved<T>(cache, kind, batch * strides.batch + row * strides.row);
}

}  // namespace umfa

/// One threadgroup copies a few rows of one head of one sequence, the keys rotated where there are
/// angles.
///
/// Metal's compiler assumes that buffer arguments do not alias, and the two caches may interleave in
/// one buffer: safe as long as no cache is read here.
template <typename T>
[[kernel]] void umfa_append(
    device uchar* key [[buffer(UMFA_APPEND_KEY)]],
    device uchar* value [[buffer(UMFA_APPEND_VALUE)]],
    device const uchar* new_key [[buffer(UMFA_APPEND_NEW_KEY)]],
    device const uchar* new_value [[buffer(UMFA_APPEND_NEW_VALUE)]],
    device const SequenceParams* sequences [[buffer(UMFA_APPEND_SEQUENCES)]],
    device const AppendTask* tasks [[buffer(UMFA_APPEND_TASKS)]],
    device const int* page_table UMFA_BUFFER_IF(UMFA_APPEND_PAGES, has_pages),
    device const uchar* rotary_cos UMFA_BUFFER_IF(UMFA_APPEND_ROTARY_COS, has_rotary),
    device const uchar* rotary_sin UMFA_BUFFER_IF(UMFA_APPEND_ROTARY_SIN, has_rotary),
    constant AppendParams& params [[buffer(UMFA_APPEND_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint3 thread_position [[thread_position_in_threadgroup]]) {
    const AppendTask task = tasks[group.x];
    const int head = group.y, rows = task.rows, first = thread_position.x;
    const SequenceParams sequence = sequences[task.sequence];
    const Rotary rotary = rotary_of(params.rotary, rotary_cos, rotary_sin);
    new_key = moved<T>(new_key, new_key_kind,
                       task.new_batch * params.new_key.batch + task.new_row * params.new_key.row +
                           head * params.new_key.head);
    new_value = moved<T>(new_value, new_value_kind,
                         task.new_batch * params.new_value.batch +
                             task.new_row * params.new_value.row + head * params.new_value.head);
    key = moved<T>(key, key_kind, head * params.key.head);
    value = moved<T>(value, value_kind, head * params.value.head);

    const int columns = params.head_dim, pairs = (columns + 1) / 2;
    for (int i = first; i < rows * pairs; i += threads.x) {
        const int row = i / pairs, pair = i % pairs;
        const int2 at = channels_of(rotary, pair);
        T a = any_element<T, T>(new_key, new_key_kind, params.new_key, row, rows, at.x, columns);
        T b = any_element<T, T>(new_key, new_key_kind, params.new_key, row, rows, at.y, columns);
        if (has_rotary && 2 * pair < rotary.params.channels)
            rotate_pair(a, b, rotary, task.position + row, pair);
        device uchar* to = place_of<T>(key, key_kind, params.key, sequence, page_table,
                                       params.pages, task.first_key + row);
        store_any<T>(to, key_kind, at.x * channel_stride(params.key), a);
        if (at.y < columns) store_any<T>(to, key_kind, at.y * channel_stride(params.key), b);
    }
    for (int i = first; i < rows * params.head_dim_v; i += threads.x) {
        const int row = i / params.head_dim_v, column = i % params.head_dim_v;
        device uchar* to = place_of<T>(value, value_kind, params.value, sequence, page_table,
                                       params.pages, task.first_key + row);
        store_any<T>(to, value_kind, column * channel_stride(params.value),
                     any_element<T, T>(new_value, new_value_kind, params.new_value, row, rows,
                                       column, params.head_dim_v));
    }
}

#define UMFA_APPEND(NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_append<TYPE>) umfa_append<TYPE>;

#ifdef UMFA_KERNEL
UMFA_APPEND(UMFA_KERNEL, UMFA_T)
#else
UMFA_APPEND("append_f16", half)
UMFA_APPEND("append_bf16", bfloat)
UMFA_APPEND("append_f32", float)
#endif
