// The cases of the self-test: each runs a small problem on the GPU and on the CPU backend with the
// same inputs, and reports where the results differ.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "metal/capabilities.h"
#include "metal/executor.h"

namespace umfa::metal {

/// Runs a plan on the GPU, and waits. Throws `Error`.
using Runner = std::function<void(const Planner&)>;

struct SelfTestCase {
    std::string family;  // excluded if the case fails
    std::string needs;   // family that must pass first; empty: none
    /// Returns the fault; empty if there is none. Throws `Error`.
    std::function<std::string(const Runner&)> run;
};

/// The cases for a dtype, each after those that it needs. The first checks the lane map.
std::vector<SelfTestCase> self_test_cases(DType dtype, const Capabilities& gpu);

}  // namespace umfa::metal
