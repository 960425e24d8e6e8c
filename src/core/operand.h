// A tensor (batch, head, position, channel) of a problem, and how callers order its dimensions.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace umfa {

/// Order of the last three dimensions of query, key, value and out; batch dimensions come before.
/// LSE is always (batch, nheads, seqlen_q).
enum class Layout : uint8_t { bshd, bhsd };

/// A tensor of the problem: strides in elements, in the order (batch, head, position, channel).
struct Operand {
    TensorView view;  // in the caller's shape
    int64_t stride_batch = 0, stride_head = 0, stride_row = 0, stride_channel = 0;
};

}  // namespace umfa
