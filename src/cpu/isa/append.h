// Appends new rows of keys and values behind those that a sequence holds.
#pragma once

#include "core/constants.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/rotary.h"
#include "cpu/isa/rows.h"

namespace umfa::cpu {
namespace {

/// Writes row `row` of those to be appended behind what the sequence holds, for all key heads.
template <class S, class T>
void append_row(const ForwardArgs& args, int64_t batch, int64_t row) {
    using storage = typename T::storage;
    const Sequence& sequence = args.sequences[batch];
    const Append& append = args.append;
    const int64_t at = sequence.seqlen_kv - sequence.new_rows + row;
    const auto from = [&](const Rows& rows, int64_t head) {
        return static_cast<const storage*>(rows.data) + sequence.new_batch * rows.stride_batch +
               head * rows.stride_head + (sequence.new_row + row) * rows.stride_row;
    };
    const auto copy = [](const storage* src, int64_t stride, int64_t channels, storage* dst,
                         int64_t dst_stride) {
        for (int64_t c = 0; c < channels; ++c) dst[c * dst_stride] = src[c * stride];
    };
    for (int64_t head = 0; head < append.heads; ++head) {
        const storage* key = from(append.key, head);
        int64_t stride = append.key.stride_channel;
        storage rotated[max_head_dim];
        if (args.rotary.element != ElementType::none) {
            rotate_row<S, T>(args.rotary, key, stride, args.head_dim, sequence.position_q + row,
                             rotated);
            key = rotated;
            stride = 1;
        }
        copy(key, stride, args.head_dim,
             key_row<storage>(args.key, sequence, args.page_size, head, at),
             args.key.stride_channel);
        copy(from(append.value, head), append.value.stride_channel, args.head_dim_v,
             key_row<storage>(args.value, sequence, args.page_size, head, at),
             args.value.stride_channel);
    }
}

}  // namespace
}  // namespace umfa::cpu
