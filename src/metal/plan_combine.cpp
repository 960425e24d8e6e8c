#include "metal/plan_combine.h"

#include "core/problem.h"
#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

constexpr int64_t channels_per_simdgroup = 128;

constexpr Slot layout[] = {
    {UMFA_COMBINE_OUT_PARTIAL, "out_partial"},
    {UMFA_COMBINE_LSE_PARTIAL, "lse_partial"},
    {UMFA_COMBINE_OUT, "out"},
    {UMFA_COMBINE_LSE, "lse"},
};

PartStrides strides_of(const CombineOperand& operand) {
    return {operand.stride_part, operand.stride_batch, operand.stride_row, operand.stride_head,
            operand.stride_channel};
}

CombineParams combine_params(const CombineProblem& problem, const CombineResults& results) {
    CombineParams params{};
    params.out_partial = strides_of(problem.out_partial);
    params.lse_partial = strides_of(problem.lse_partial);
    params.out = strides_of(results.out);
    params.lse = strides_of(results.lse);
    params.parts = static_cast<int32_t>(problem.parts);
    params.rows = static_cast<int32_t>(problem.seqlen_q * problem.nheads);
    params.heads = static_cast<int32_t>(problem.nheads);
    params.head_dim = static_cast<int32_t>(problem.head_dim);
    return params;
}

}  // namespace

Verdict can_plan_combine(const CombineProblem& problem) {
    // The kernel counts them in 32 bits.
    if (problem.parts > max_seqlen || problem.batch > max_seqlen ||
        problem.seqlen_q * problem.nheads > max_seqlen)
        return {false, "more than " + std::to_string(max_seqlen) +
                           " parts, or rows of one index of the batch, are not implemented"};
    return {};
}

LaunchPlan plan_combine(const CombineProblem& problem, const CombineResults& results,
                        const Capabilities& gpu) {
    LaunchPlan plan;
    plan.tensors = {{"out_partial", problem.out_partial.view},
                    {"lse_partial", problem.lse_partial.view},
                    {"out", results.out.view, false, true},
                    {"lse", results.lse.view, false, true}};
    const int64_t rows = problem.seqlen_q * problem.nheads;
    if (rows == 0 || problem.batch == 0) return plan;
    const ElementType from = stored_type(problem.out_partial.view.dtype),
                      to = stored_type(problem.out_dtype);
    const int simdgroups = fit_simdgroups(8, 1, gpu).count;
    LaunchBuilder(plan, problem.function, {}, std::string("combine_") + from.name + "_" + to.name,
                  "combine.metal", UMFA_COMBINE_BUFFERS)
        .stores(from)
        .macro("UMFA_O", to.storage)
        .tensors(layout)
        .params(UMFA_COMBINE_PARAMS, combine_params(problem, results))
        .grid((rows + simdgroups - 1) / simdgroups,
              (problem.head_dim + channels_per_simdgroup - 1) / channels_per_simdgroup,
              problem.batch)
        .simdgroups(simdgroups)
        .add();
    return plan;
}

}  // namespace umfa::metal
