// Quantised keys and values of the forward kernel.
#pragma once

#include <vector>

#include "core/backend.h"
#include "core/launch_plan.h"
#include "core/problem.h"
#include "metal/launch_builder.h"

namespace umfa::metal {

/// Whether kernels can count the rows of the codes.
Verdict can_plan_codes(const Problem& problem);

/// Adds the scales and offsets to a plan's table.
void add_code_tensors(std::vector<PlanTensor>& tensors, const Problem& problem);

/// Sets the constants that say how keys and values are read, except their kinds.
void set_code_constants(std::vector<Constant>& constants, const Problem& problem);

/// Binds scales, offsets and what blocks are to a launch of the forward kernel, where there are any.
void bind_codes(LaunchBuilder& launch, const Problem& problem);

}  // namespace umfa::metal
