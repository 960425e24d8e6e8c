// The small problems of the self-test: each runs on the GPU and on the CPU backend, with the same
// numbers, and tells where the results differ.
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
    std::string family;  // whose fault it is if the case fails
    std::string needs;   // a family without which it can tell nothing; empty: none
    /// What is wrong; empty if nothing is. Throws `Error`.
    std::function<std::string(const Runner&)> run;
};

/// The cases of the kernels for tensors of a dtype, each after those that it needs. The first looks
/// at the map of lanes.
std::vector<SelfTestCase> self_test_cases(DType dtype, const Capabilities& gpu);

}  // namespace umfa::metal
