// Plays LaunchPlans: on umfa's own queue, or into a command buffer of the caller's.
#pragma once

#include <functional>
#include <string_view>

#include "core/backend.h"
#include "core/backward.h"
#include "core/combine.h"
#include "core/launch_plan.h"
#include "core/problem.h"
#include "core/quantize.h"
#include "metal/capabilities.h"

namespace umfa::metal {

class Context;

/// Plans a problem for a GPU.
using Planner = std::function<LaunchPlan(const Capabilities&)>;

/// Runs the plan on umfa's own queue, in command buffers of slice_seconds(), and waits.
void run(Context& context, std::string_view caller, const Planner& plan);

void forward(const Problem& problem, const ForwardResults& results);
Kernels prepare_forward(const Problem& problem, const ForwardResults& results);
Kernels prepare_combine(const CombineProblem& problem, const CombineResults& results);
void encode_forward(const Problem& problem, const ForwardResults& results, void* command_buffer);
void backward(const BackwardProblem& problem, const BackwardResults& results);
void combine(const CombineProblem& problem, const CombineResults& results);
/// Throws `Error` if a block has no scale and the problem does not allow it.
void quantize(const QuantizeProblem& problem, const QuantizeResults& results);
void dequantize(const DequantizeProblem& problem, const DequantizeResults& results);
/// Plan for this GPU, and let the player launch. False: it takes none of the launches.
bool play_forward(const Problem& problem, const ForwardResults& results, Player& player);
bool play_backward(const BackwardProblem& problem, const BackwardResults& results, Player& player);
bool play_combine(const CombineProblem& problem, const CombineResults& results, Player& player);
/// Requires problem.allow_nonfinite: else the host has to wait, and look for blocks without a scale.
bool play_quantize(const QuantizeProblem& problem, const QuantizeResults& results, Player& player);
bool play_dequantize(const DequantizeProblem& problem, const DequantizeResults& results,
                     Player& player);

}  // namespace umfa::metal
