// Planner of the forward pass with few queries: the keys are split among threadgroups.
#pragma once

#include "core/problem.h"
#include "metal/capabilities.h"
#include "metal/launch_plan.h"

namespace umfa::metal {

/// Whether the problem has few enough queries, and a head_dim that the decode kernel holds.
bool is_decode(const Problem& problem);

/// Adds the launches to the plan. Requires is_decode(problem), and out attached.
void plan_decode(LaunchPlan& plan, const Problem& problem, const Capabilities& gpu);

}  // namespace umfa::metal
