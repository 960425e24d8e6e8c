#include "core/error.h"
#include "core/instruments.h"
#include "metal/plan_forward.h"

namespace umfa::metal {

LaunchPlan plan(const Problem& problem, int family, int cores) {
    if (family < 7 || family > 10)
        fail(ErrorKind::value, problem.function, "GPU family is unknown", std::to_string(family),
             "7 to 10");
    if (!problem.loops.empty())
        fail(ErrorKind::unsupported, problem.function, "no single plan for this",
             std::to_string(problem.slices()) + " plans", "batch dimensions that are one");
    const Verdict verdict = can_plan_forward(problem);
    if (!verdict.yes)
        fail(ErrorKind::unsupported, problem.function, "no Metal kernel for this", verdict.reason,
             "what one has");
    Capabilities gpu;
    gpu.family = static_cast<Family>(family);
    gpu.cores = cores;
    return plan_forward(problem, gpu);
}

}  // namespace umfa::metal
