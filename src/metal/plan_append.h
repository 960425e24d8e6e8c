// Planner of what comes before attention: new keys and values into the caches.
#pragma once

#include "metal/plan_sequences.h"
#include "metal/plan_tables.h"

namespace umfa::metal {

/// Rows of one threadgroup, whose threads a single row would leave without work.
constexpr int64_t append_rows_per_threadgroup = 8;

/// Adds the launch, where there are new rows. `pages` as add_pages gave it.
void plan_append(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 std::optional<uint32_t> pages);
/// The same where a kernel has found the places.
void plan_append(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const TablePlaces& places);

}  // namespace umfa::metal
