// Planner of the forward pass.
#pragma once

#include "core/backend.h"
#include "core/export.h"
#include "core/launch_plan.h"
#include "core/problem.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// What the forward and decode kernels do.
constexpr uint32_t forward_features =
    bit(Feature::causal) | bit(Feature::window) | bit(Feature::softcap) | bit(Feature::alibi) |
    bit(Feature::lse) | bit(Feature::gqa) | bit(Feature::mask) | bit(Feature::sinks) |
    bit(Feature::varlen) | bit(Feature::paged_kv) | bit(Feature::attention_chunk) |
    bit(Feature::rotary) | bit(Feature::append) | bit(Feature::dropout) | bit(Feature::qv) |
    bit(Feature::quantized);

/// Whether plan_forward can carry the problem out, and if not, why.
UMFA_CORE_API Verdict can_plan_forward(const Problem& problem);

/// Requires can_plan_forward(problem).yes. Few queries go to the decode kernel
/// (plan_decode.h), which splits the keys; the others to the full-length one, which splits the
/// queries.
UMFA_CORE_API LaunchPlan plan_forward(const Problem& problem, const ForwardResults& results,
                                      const Capabilities& gpu);

}  // namespace umfa::metal
