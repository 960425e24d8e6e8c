#include <utility>
#include <vector>

#include "core/error.h"
#include "core/instruments.h"
#include "metal/plan_backward.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/plan_quantize.h"

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

LaunchPlan only_plan(std::vector<LaunchPlan> plans, std::string_view function) {
    if (plans.size() != 1)
        fail(ErrorKind::unsupported, function, "no single plan for this",
             std::to_string(plans.size()) + " plans", "batch dimensions that are one");
    return std::move(plans.front());
}

}  // namespace

LaunchPlan plan(const Problem& problem, const ForwardResults& results, int family, int cores,
                const std::vector<std::string>& tiles) {
    Capabilities gpu = capabilities_of(family, cores, problem.function);
    gpu.tiles = tiles;
    check_can(can_plan_forward(problem), problem.function);
    std::vector<LaunchPlan> plans;
    for_each_part(problem, results, [&](const Problem& part, const ForwardResults& own) {
        plans.push_back(plan_forward(part, own, gpu));
    });
    return only_plan(std::move(plans), problem.function);
}

LaunchPlan plan(const CombineProblem& problem, const CombineResults& results, int family,
                int cores) {
    const Capabilities gpu = capabilities_of(family, cores, problem.function);
    check_can(can_plan_combine(problem), problem.function);
    return plan_combine(problem, results, gpu);
}

LaunchPlan plan(const QuantizeProblem& problem, const QuantizeResults& results, uint8_t* faults,
                int family, int cores) {
    const Capabilities gpu = capabilities_of(family, cores, problem.function);
    check_can(can_plan_quantize(problem), problem.function);
    const TensorView view = faults_view(problem, faults);
    return plan_quantize(problem, results, faults ? &view : nullptr, gpu);
}

LaunchPlan plan(const DequantizeProblem& problem, const DequantizeResults& results, int family,
                int cores) {
    const Capabilities gpu = capabilities_of(family, cores, problem.function);
    check_can(can_plan_dequantize(problem), problem.function);
    return plan_dequantize(problem, results, gpu);
}

LaunchPlan plan(const BackwardProblem& problem, const BackwardResults& results, int family,
                int cores) {
    const std::string_view function = problem.forward.function;
    const Capabilities gpu = capabilities_of(family, cores, function);
    check_can(can_plan_backward(problem), function);
    std::vector<LaunchPlan> plans;
    for_each_part(problem, results, [&](const BackwardProblem& part, const BackwardResults& own) {
        plans.push_back(plan_backward(part, own, gpu));
    });
    return only_plan(std::move(plans), function);
}

}  // namespace umfa::metal
