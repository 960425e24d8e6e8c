// The backward pass on the CPU.
#pragma once

#include "core/backward.h"

namespace umfa::cpu {

constexpr uint32_t backward_features =
    bit(Feature::causal) | bit(Feature::window) | bit(Feature::softcap) | bit(Feature::alibi) |
    bit(Feature::lse) | bit(Feature::gqa) | bit(Feature::mask) | bit(Feature::sinks) |
    bit(Feature::varlen) | bit(Feature::attention_chunk) | bit(Feature::rotary) |
    bit(Feature::dropout) | bit(Feature::qv);

void run_backward(const BackwardProblem& problem, const BackwardResults& results);

}  // namespace umfa::cpu
