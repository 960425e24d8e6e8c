// Tensors of the self-test in host memory. Their numbers are the same in every run: they depend
// only on the order in which the tensors are made.
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
    /// Filled with NaN, so that elements which a kernel does not write are found.
    TensorView unwritten(DType dtype, const Sizes& shape);
    TensorView table(const std::vector<int32_t>& values);
    /// The same numbers in float32. `view` is dense.
    TensorView as_float32(const TensorView& view);

private:
    TensorView make(DType dtype, const Sizes& shape);
    uint32_t random();

    std::deque<std::vector<uint64_t>> memory_;
    uint32_t state_ = 1;
};

/// Describes the first byte that differs; empty if there is none. Both are dense.
std::string byte_difference(const std::string& name, const TensorView& got,
                            const TensorView& expected);

/// Describes the largest difference beyond the tolerance; empty if there is none. Both are dense.
std::string difference(const std::string& name, const TensorView& got, const TensorView& expected);

}  // namespace umfa::metal
