// Planner of the look at the map of lanes.
#pragma once

#include "core/launch_plan.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// The dtype of the matrices that kernels for tensors of `dtype` hold on that GPU.
DType matrix_dtype(DType dtype, const Capabilities& gpu);

/// Loads `matrix`, 8x8 elements, and writes to `held` what each lane has of it, two elements a lane.
LaunchPlan plan_lanes(const TensorView& matrix, const TensorView& held);

}  // namespace umfa::metal
