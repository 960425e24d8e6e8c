// Planner of the kernel that writes the lane map.
#pragma once

#include "core/launch_plan.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// The matrix dtype of the kernels for tensors of `dtype` on that GPU.
DType matrix_dtype(DType dtype, const Capabilities& gpu);

/// Loads the 8x8 `matrix` and writes to `held` the two elements that each lane holds.
LaunchPlan plan_lanes(const TensorView& matrix, const TensorView& held);

}  // namespace umfa::metal
