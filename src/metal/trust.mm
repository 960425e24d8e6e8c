#import "metal/trust.h"

#include <algorithm>
#include <memory>
#include <vector>

#import "metal/autorelease.h"
#import "metal/context.h"
#include "metal/executor.h"
#include "metal/plan_parts.h"
#include "metal/self_test.h"

namespace umfa::metal {
namespace {

constexpr const char* function = "umfa.self_test";

/// Makes the self-test's view of a context's GPU.
SelfTests::MakeMachine machine_of(const std::shared_ptr<Context>& context) {
    return [context] {
        const Gpu& gpu = context->gpu();
        auto machine = std::make_shared<Machine>();
        machine->device = gpu.name + ", " + gpu.architecture + ", Apple" +
                          std::to_string(static_cast<int>(gpu.capabilities.family));
        machine->capabilities = gpu.capabilities;
        machine->run = [context](const Planner& plan) { run(*context, function, plan); };
        machine->after_hang = [context] {
            const AutoreleasePool pool;
            context->replace_queue(context->queue(function));
        };
        return machine;
    };
}

using Dtypes = std::vector<DType>;

void add(Dtypes& dtypes, DType dtype) {
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) dtypes.push_back(dtype);
}

/// Dtypes of the kernels that a problem may need. Float kernels read tensors of different dtypes;
/// kernels that only write results have the dtype of the result.
Dtypes dtypes_of(const Problem& problem) {
    Dtypes dtypes = {arithmetic_dtype(problem)};
    add(dtypes, problem.out_dtype);
    if (!problem.append) return dtypes;
    const DType cache = problem.key.view.dtype;
    add(dtypes, cache);
    for (const Operand* other : {&problem.value, &problem.append->key, &problem.append->value})
        if (other->view.dtype != cache) add(dtypes, DType::f32);
    return dtypes;
}

Dtypes dtypes_of(const CombineProblem& problem) { return {problem.out_partial.view.dtype}; }

Dtypes dtypes_of(const QuantizeProblem& problem) { return {problem.x.view.dtype}; }
Dtypes dtypes_of(const DequantizeProblem& problem) { return {problem.out_dtype}; }

/// Float kernels also where dout has another dtype; rows in no sequence are cleared in the results'.
Dtypes dtypes_of(const BackwardProblem& problem) {
    const Problem& forward = problem.forward;
    const DType dtype = forward.query.view.dtype;
    Dtypes dtypes = {forward.one_dtype() && problem.dout.view.dtype == dtype ? dtype : DType::f32};
    for (const Operand* operand : {&forward.query, &forward.key, &forward.value})
        add(dtypes, operand->view.dtype);
    return dtypes;
}

std::string_view function_of(const Problem& problem) { return problem.function; }
std::string_view function_of(const CombineProblem& problem) { return problem.function; }
std::string_view function_of(const BackwardProblem& problem) { return problem.forward.function; }
std::string_view function_of(const QuantizeProblem& problem) { return problem.function; }
std::string_view function_of(const DequantizeProblem& problem) { return problem.function; }

template <class P>
Verdict trusts_problem(const P& problem) {
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current(function_of(problem));
    for (const DType dtype : dtypes_of(problem)) {
        const auto report = context->self_tests().of(dtype, machine_of(context));
        if (report->passed()) continue;
        Verdict verdict = trusts(*report, plan_without_results(problem, context->capabilities()));
        if (!verdict.yes) return verdict;
    }
    return {};
}

template <class P>
bool problem_may_wait(const P& problem) {
    if (!Context::available().yes) return false;
    const std::shared_ptr<Context> context = Context::current(function);
    SelfTests& tests = context->self_tests();
    const Dtypes dtypes = dtypes_of(problem);
    return std::any_of(dtypes.begin(), dtypes.end(),
                       [&](DType dtype) { return tests.may_wait(dtype); });
}

}  // namespace

Verdict trusts_forward(const Problem& problem) { return trusts_problem(problem); }
Verdict trusts_combine(const CombineProblem& problem) { return trusts_problem(problem); }
Verdict trusts_backward(const BackwardProblem& problem) { return trusts_problem(problem); }
Verdict trusts_quantize(const QuantizeProblem& problem) { return trusts_problem(problem); }
Verdict trusts_dequantize(const DequantizeProblem& problem) { return trusts_problem(problem); }
bool forward_may_wait(const Problem& problem) { return problem_may_wait(problem); }
bool combine_may_wait(const CombineProblem& problem) { return problem_may_wait(problem); }
bool backward_may_wait(const BackwardProblem& problem) { return problem_may_wait(problem); }
bool quantize_may_wait(const QuantizeProblem& problem) { return problem_may_wait(problem); }
bool dequantize_may_wait(const DequantizeProblem& problem) { return problem_may_wait(problem); }

std::function<void()> self_tests_for(const Problem& problem) {
    const std::shared_ptr<Context> context = Context::current(problem.function);
    return [context, dtypes = dtypes_of(problem)] {
        const AutoreleasePool pool;
        for (const DType dtype : dtypes) context->self_tests().of(dtype, machine_of(context));
    };
}

SelfTestReports self_tests(bool run) {
    const AutoreleasePool pool;
    self_test_mode();  // an invalid value is an error without a GPU too
    if (!Context::available().yes) return {};
    const std::shared_ptr<Context> context = Context::current(function);
    SelfTests& tests = context->self_tests();
    SelfTestReports reports;
    for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        const auto report =
            run ? tests.of(dtype, machine_of(context)) : tests.known(dtype, machine_of(context));
        if (report && !report->results.empty()) reports.push_back(report);
    }
    return reports;
}

}  // namespace umfa::metal
