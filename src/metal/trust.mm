#import "metal/trust.h"

#include <memory>

#import "metal/autorelease.h"
#import "metal/context.h"
#include "metal/executor.h"
#include "metal/self_test.h"

namespace umfa::metal {
namespace {

constexpr const char* function = "umfa.self_test";

/// The GPU of a context, for its test.
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

DType dtype_of(const Problem& problem) { return problem.query.view.dtype; }
DType dtype_of(const CombineProblem& problem) { return problem.out_partial.view.dtype; }

template <class P>
Verdict trusts_problem(const P& problem) {
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current(problem.function);
    const auto report = context->self_tests().of(dtype_of(problem), machine_of(context));
    if (report->passed()) return {};
    return trusts(*report, plan_without_results(problem, context->gpu().capabilities));
}

template <class P>
bool problem_may_wait(const P& problem) {
    if (!Context::available().yes) return false;
    return Context::current(function)->self_tests().may_wait(dtype_of(problem));
}

}  // namespace

Verdict trusts_forward(const Problem& problem) { return trusts_problem(problem); }
Verdict trusts_combine(const CombineProblem& problem) { return trusts_problem(problem); }
bool forward_may_wait(const Problem& problem) { return problem_may_wait(problem); }
bool combine_may_wait(const CombineProblem& problem) { return problem_may_wait(problem); }

SelfTestReports self_tests(bool run) {
    const AutoreleasePool pool;
    self_test_mode();  // a wrong one is an error without a GPU too
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
