// Planner of the backward pass.
#pragma once

#include "core/backend.h"
#include "core/backward.h"
#include "core/export.h"
#include "core/launch_plan.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// What the kernels of the backward pass do.
constexpr uint32_t backward_features =
    bit(Feature::causal) | bit(Feature::window) | bit(Feature::softcap) | bit(Feature::alibi) |
    bit(Feature::lse) | bit(Feature::gqa) | bit(Feature::mask) | bit(Feature::sinks) |
    bit(Feature::varlen) | bit(Feature::attention_chunk) | bit(Feature::dropout) |
    bit(Feature::rotary) | bit(Feature::qv);

/// Whether plan_backward can carry the problem out, and if not, why.
UMFA_CORE_API Verdict can_plan_backward(const BackwardProblem& problem);

/// Requires can_plan_backward(problem).yes.
UMFA_CORE_API LaunchPlan plan_backward(const BackwardProblem& problem,
                                       const BackwardResults& results, const Capabilities& gpu);

}  // namespace umfa::metal
