// Planner of merging the results of parts of the keys.
#pragma once

#include "core/backend.h"
#include "core/combine.h"
#include "core/export.h"
#include "core/launch_plan.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// Whether plan_combine can, and if not, why.
UMFA_CORE_API Verdict can_plan_combine(const CombineProblem& problem);

/// Requires can_plan_combine(problem).yes, and the results attached.
UMFA_CORE_API LaunchPlan plan_combine(const CombineProblem& problem, const CombineResults& results,
                                      const Capabilities& gpu);

}  // namespace umfa::metal
