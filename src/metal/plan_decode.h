// Planner of the forward pass with few queries: the keys are split among threadgroups.
#pragma once

#include "metal/capabilities.h"
#include "metal/plan_sequences.h"

namespace umfa::metal {

/// Whether so many queries are few enough for splitting the keys.
bool is_decode(const Problem& problem, int64_t seqlen_q);

/// Adds the launches for the chosen indices of the batch (where there are no sequences: all) to the
/// plan. Requires is_decode of each, and out attached. `pages` as add_pages gave it.
void plan_decode(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages);

}  // namespace umfa::metal
