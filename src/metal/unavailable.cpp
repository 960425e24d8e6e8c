// The Metal backend of a build without Metal: its planner says what it could do, but it cannot run.
#include "core/backend.h"
#include "core/error.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/self_test.h"

namespace umfa::metal {
namespace {

Verdict unavailable() {
    static const SelfTestMode checked = self_test_mode();  // an invalid value is always an error
    (void)checked;
    return {false, "this build of umfa has no Metal backend"};
}

template <class P>
void refuse(const P& problem, const typename P::Results&) {
    fail(ErrorKind::internal, problem.function, "the Metal backend was called", "metal", "cpu");
}

}  // namespace

const Backend backend{"metal",
                      unavailable,
                      [](Device) { return true; },
                      {forward_features, can_plan_forward, refuse<Problem>},
                      {0, can_plan_combine, refuse<CombineProblem>},
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      [](bool) -> SelfTestReports {
                          self_test_mode();  // an invalid value is an error without a GPU too
                          return {};
                      }};

}  // namespace umfa::metal
