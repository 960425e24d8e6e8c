// How the arguments of a backward pass in Python become a BackwardProblem.
#pragma once

#include <string>
#include <vector>

#include "core/backward.h"
#include "python/record.h"

namespace umfa::python {

/// Keeps what the problem's views point to.
struct BackwardTensors {
    Inputs attention;
    Input saved[4];
};

/// `saved`: (out, lse, dout, dlse or None); `wanted`: names of gradients.
BackwardProblem make_backward(const Options& options, const nb::tuple& tensors,
                              const nb::tuple& saved, const std::vector<std::string>& wanted,
                              BackwardTensors& kept);

}  // namespace umfa::python
