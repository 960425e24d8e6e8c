// Planner of what comes before attention: new keys and values into the caches.
#pragma once

#include "metal/plan_sequences.h"

namespace umfa::metal {

/// Adds the launch, where there are new rows. `pages` as add_pages gave it.
void plan_append(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 std::optional<uint32_t> pages);

}  // namespace umfa::metal
