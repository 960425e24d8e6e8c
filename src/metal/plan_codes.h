// Quantised keys and values of the forward kernel.
#pragma once

#include <vector>

#include "core/backend.h"
#include "core/launch_plan.h"
#include "core/problem.h"
#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {

/// Whether kernels can count the rows of the codes.
Verdict can_plan_codes(const Problem& problem);

/// Adds the scales and offsets to a plan's table.
void add_code_tensors(std::vector<PlanTensor>& tensors, const Problem& problem);

/// Sets the constants that say how keys and values are read, except their kinds.
void set_code_constants(std::vector<Constant>& constants, const Problem& problem);

/// Where a kernel's layout has scales, offsets and what blocks are.
struct CodeSlots {
    uint32_t key_scales, key_offsets, value_scales, value_offsets, params;
};
inline constexpr CodeSlots forward_codes{UMFA_FORWARD_KEY_SCALES, UMFA_FORWARD_KEY_OFFSETS,
                                         UMFA_FORWARD_VALUE_SCALES, UMFA_FORWARD_VALUE_OFFSETS,
                                         UMFA_FORWARD_CODES};
inline constexpr CodeSlots decode_codes{UMFA_DECODE_KEY_SCALES, UMFA_DECODE_KEY_OFFSETS,
                                        UMFA_DECODE_VALUE_SCALES, UMFA_DECODE_VALUE_OFFSETS,
                                        UMFA_DECODE_CODES};

/// Binds them to a launch, where there are any.
void bind_codes(LaunchBuilder& launch, const Problem& problem, const CodeSlots& slots);

/// Whether the decode kernels can read keys and values: where they are quantised, lanes read parts of
/// runs, each with one scale.
bool decodes_codes(const Problem& problem);

}  // namespace umfa::metal
