// Sums that no backend has to know of: gradients of query, key and value that broadcast, and those of
// masks, sinks and slopes that several parts of the batch share.
#pragma once

#include <functional>
#include <string>

#include "core/backward.h"

namespace umfa {

/// Why the sums of the problem cannot be done; empty if they can, or if there are none.
std::string missing_sum_text(const BackwardProblem& problem);

/// Calls `run` for each part of the problem, as for_each_part() does, where nothing broadcasts in
/// the gradients of query, key and value. Then writes the sums, each in the order of the indices. A
/// gradient that is summed takes memory for its terms (of a broadcast tensor, the full shape) in
/// float32.
void with_sums(const BackwardProblem& problem, const BackwardResults& results,
               const std::function<void(const BackwardProblem&, const BackwardResults&)>& run);

}  // namespace umfa
