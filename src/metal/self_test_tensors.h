// Tensors of the self-test in host memory, with numbers that depend only on the order in which they
// are made.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/tensor_view.h"

namespace umfa::metal {

class SelfTestTensors {
public:
    using Sizes = std::vector<int64_t>;
    /// Numbers between -2 and 2 that are exact in the dtype.
    TensorView numbers(DType dtype, const Sizes& shape);
    /// NaN: what a kernel does not write shows.
    TensorView unwritten(DType dtype, const Sizes& shape);
    TensorView table(const std::vector<int32_t>& values);

private:
    TensorView make(DType dtype, const Sizes& shape);
    uint32_t random();

    std::deque<std::vector<uint64_t>> memory_;
    uint32_t state_ = 1;
};

/// How a result differs from what it should be by more than rounding allows; empty if it does not.
/// Both are dense.
std::string difference(const std::string& name, const TensorView& got, const TensorView& expected);

}  // namespace umfa::metal
