// Planner of quantising a tensor, and of the way back.
#pragma once

#include "core/backend.h"
#include "core/export.h"
#include "core/launch_plan.h"
#include "core/quantize.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// Whether plan_quantize and plan_dequantize can, and if not, why.
UMFA_CORE_API Verdict can_plan_quantize(const QuantizeProblem& problem);
UMFA_CORE_API Verdict can_plan_dequantize(const DequantizeProblem& problem);

/// A byte for each block in host memory: UMFA_FAULT_ of shared/params.h.
UMFA_CORE_API TensorView faults_view(const QuantizeProblem& problem, uint8_t* memory);

/// Requires can_plan_quantize(problem).yes. `faults`: as of faults_view(); nullptr if nobody asks.
UMFA_CORE_API LaunchPlan plan_quantize(const QuantizeProblem& problem,
                                       const QuantizeResults& results, const TensorView* faults,
                                       const Capabilities& gpu);

/// Requires can_plan_dequantize(problem).yes.
UMFA_CORE_API LaunchPlan plan_dequantize(const DequantizeProblem& problem,
                                         const DequantizeResults& results, const Capabilities& gpu);

}  // namespace umfa::metal
