// Whether the self-test of this GPU passed for the kernels of a problem.
#pragma once

#include <functional>

#include "core/backend.h"

namespace umfa::metal {

/// The first call with a dtype runs the self-test for it.
Verdict trusts_forward(const Problem& problem);
Verdict trusts_combine(const CombineProblem& problem);
Verdict trusts_backward(const BackwardProblem& problem);
Verdict trusts_quantize(const QuantizeProblem& problem);
Verdict trusts_dequantize(const DequantizeProblem& problem);
/// Whether they may run the self-test or wait for it.
bool forward_may_wait(const Problem& problem);
bool combine_may_wait(const CombineProblem& problem);
bool backward_may_wait(const BackwardProblem& problem);
bool quantize_may_wait(const QuantizeProblem& problem);
bool dequantize_may_wait(const DequantizeProblem& problem);

/// What runs the self-tests that trusts_forward() needs, later. It keeps nothing of the problem.
std::function<void()> self_tests_for(const Problem& problem);

/// Outcomes of the self-test. `run`: first tests each untested dtype.
SelfTestReports self_tests(bool run);

}  // namespace umfa::metal
