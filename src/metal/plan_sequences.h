// What the planners do where sequences lie anywhere in the tensors: their places as data of the plan,
// and the rows between them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/launch_plan.h"
#include "core/problem.h"
#include "shared/params.h"

namespace umfa::metal {

/// Indices of the batch that one launch is about.
using Chosen = std::vector<int64_t>;

/// Where every sequence lies. Without the fields of split-KV.
std::vector<SequenceParams> sequence_params(const Problem& problem);

/// Adds the table of pages to the plan's data, where there is one. Returns its number.
std::optional<uint32_t> add_pages(LaunchPlan& plan, const Problem& problem);

/// Launches a kernel that writes the rows of out and lse that belong to no sequence, if there are
/// any.
void plan_unused_rows(LaunchPlan& plan, const Problem& problem, const ForwardResults& results);
/// Launches it for other rows: those of `results.out`, which the plan's table has as `name`.
void plan_cleared_rows(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                       const char* name, const std::vector<RowRange>& rows, int64_t nheads,
                       int64_t channels);

/// Rows of key and value that belong to no sequence.
std::vector<RowRange> unused_key_rows(const Problem& problem);

}  // namespace umfa::metal
