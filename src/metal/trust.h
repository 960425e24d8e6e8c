// Whether this GPU's self-test trusts the kernels of a problem.
#pragma once

#include "core/backend.h"

namespace umfa::metal {

/// The first to ask about a dtype tests it.
Verdict trusts_forward(const Problem& problem);
Verdict trusts_combine(const CombineProblem& problem);
/// Whether these might test, or wait for a test.
bool forward_may_wait(const Problem& problem);
bool combine_may_wait(const CombineProblem& problem);

/// What the tests have found. `run`: tests what is untested.
SelfTestReports self_tests(bool run);

}  // namespace umfa::metal
