// Plays LaunchPlans: on umfa's own queue, or into a command buffer of the caller's.
#pragma once

#include "core/combine.h"
#include "core/problem.h"

namespace umfa::metal {

void forward(const Problem& problem, const ForwardResults& results);
void encode_forward(const Problem& problem, const ForwardResults& results, void* command_buffer);
void combine(const CombineProblem& problem, const CombineResults& results);

}  // namespace umfa::metal
