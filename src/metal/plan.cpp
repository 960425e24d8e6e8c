#include "core/error.h"
#include "core/instruments.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"

namespace umfa::metal {

namespace {

Capabilities capabilities_of(int family, int cores, std::string_view function) {
    if (family < 7 || family > 10)
        fail(ErrorKind::value, function, "GPU family is unknown", std::to_string(family),
             "7 to 10");
    Capabilities gpu;
    gpu.family = static_cast<Family>(family);
    gpu.cores = cores;
    return gpu;
}

void check_can(const Verdict& verdict, std::string_view function) {
    if (!verdict.yes)
        fail(ErrorKind::unsupported, function, "no Metal kernel for this", verdict.reason,
             "what one has");
}

}  // namespace

LaunchPlan plan(const Problem& problem, int family, int cores) {
    const Capabilities gpu = capabilities_of(family, cores, problem.function);
    if (!problem.loops.empty())
        fail(ErrorKind::unsupported, problem.function, "no single plan for this",
             std::to_string(problem.slices()) + " plans", "batch dimensions that are one");
    check_can(can_plan_forward(problem), problem.function);
    return plan_forward(problem, gpu);
}

LaunchPlan plan(const CombineProblem& problem, int family, int cores) {
    const Capabilities gpu = capabilities_of(family, cores, problem.function);
    check_can(can_plan_combine(problem), problem.function);
    return plan_combine(problem, gpu);
}

}  // namespace umfa::metal
