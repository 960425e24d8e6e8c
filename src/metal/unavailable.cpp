// The Metal backend of a build without Metal: its planner says what it could do, but it cannot run.
#include "core/backend.h"
#include "core/error.h"
#include "metal/plan_backward.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/plan_quantize.h"
#include "metal/self_test.h"
#include "metal/switches.h"

namespace umfa::metal {
namespace {

Verdict unavailable() {
    static const bool checked = (check_environment(), true);
    (void)checked;
    return {false, "this build of umfa has no Metal backend"};
}

std::string_view function_of(const Problem& problem) { return problem.function; }
std::string_view function_of(const CombineProblem& problem) { return problem.function; }
std::string_view function_of(const BackwardProblem& problem) { return problem.forward.function; }
std::string_view function_of(const QuantizeProblem& problem) { return problem.function; }
std::string_view function_of(const DequantizeProblem& problem) { return problem.function; }

template <class P>
void refuse(const P& problem, const typename P::Results&) {
    fail(ErrorKind::internal, function_of(problem), "the Metal backend was called", "metal", "cpu");
}

}  // namespace

const Backend backend{"metal",
                      unavailable,
                      [](Device) { return true; },
                      {forward_features, can_plan_forward, refuse<Problem>},
                      {0, can_plan_combine, refuse<CombineProblem>},
                      {backward_features, can_plan_backward, refuse<BackwardProblem>},
                      {0, can_plan_quantize, refuse<QuantizeProblem>},
                      {0, can_plan_dequantize, refuse<DequantizeProblem>},
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      [](bool) -> SelfTestReports {
                          self_test_mode();  // an invalid value is an error without a GPU too
                          return {};
                      }};

}  // namespace umfa::metal
