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

/// row[0, channels) = x, rounded to the element type. `x` is padded to whole vectors.
template <class S>
inline void store_elements(ElementType type, const float* x, int64_t channels, char* row,
                           int64_t stride) {
    with_units<S, AnyUnits<S>>(type, [&](auto units) {
        using T = typename decltype(units)::type;
        typename T::storage buffer[S::W], *to = reinterpret_cast<typename T::storage*>(row);
        for (int64_t c = 0; c < channels; c += S::W) {
            T::template store<S>(buffer, S::load(x + c));
            for (int64_t i = 0; i < S::W && c + i < channels; ++i) to[(c + i) * stride] = buffer[i];
        }
    });
}

/// append_row() for mixed dtypes: rotates a row in float32, then rounds once to the cache's dtype.
template <class S>
void append_any(const ForwardArgs& args, int64_t batch, int64_t row) {
    constexpr int64_t most = max_head_dim + S::W;
    const Sequence& sequence = args.sequences[batch];
    const int64_t at = sequence.seqlen_kv - sequence.new_rows + row;
    const auto read = [&](const Rows& rows, ElementType type, int64_t head, int64_t channels,
                          float* x) {
        const char* from = static_cast<const char*>(rows.data) +
                           sequence.new_batch * rows.stride_batch + head * rows.stride_head +
                           (sequence.new_row + row) * rows.stride_row;
        for (int64_t c = 0; c < channels; c += S::W)
            S::store(x + c, numbers<S>(type, from + c * rows.stride_channel * size_of(type),
                                       rows.stride_channel, channels - c));
    };
    const auto write = [&](const Rows& cache, ElementType type, int64_t head, int64_t channels,
                           const float* x) {
        store_elements<S>(type, x, channels,
                          key_row<char>(cache, sequence, args.page_size, head, at),
                          cache.stride_channel);
    };
    for (int64_t head = 0; head < args.append.heads; ++head) {
        float x[most];
        read(args.append.key, args.types.new_key, head, args.head_dim, x);
        if (args.rotary.element != ElementType::none)
            rotate<S>(args.rotary, sequence.position_q + row, x);
        write(args.key, args.types.key, head, args.head_dim, x);
        read(args.append.value, args.types.new_value, head, args.head_dim_v, x);
        write(args.value, args.types.value, head, args.head_dim_v, x);
    }
}

}  // namespace
}  // namespace umfa::cpu
