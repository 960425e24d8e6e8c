#include "metal/plan_forward.h"

#include "core/error.h"
#include "metal/launch_builder.h"
#include "metal/plan_append.h"
#include "metal/plan_decode.h"
#include "metal/plan_sequences.h"
#include "shared/forward_shapes.h"
#include "shared/indices.h"
#include "shared/threadgroup_memory.h"

namespace umfa::metal {
namespace {

constexpr Slot layout[] = {
    {UMFA_FORWARD_QUERY, "query"},
    {UMFA_FORWARD_KEY, "key"},
    {UMFA_FORWARD_VALUE, "value"},
    {UMFA_FORWARD_OUT, "out"},
    {UMFA_FORWARD_LSE, "lse"},
    {UMFA_FORWARD_MASK, "attn_mask"},
    {UMFA_FORWARD_SLOPES, "alibi_slopes"},
    {UMFA_FORWARD_SINKS, "learnable_sink"},
    {UMFA_FORWARD_ROTARY_COS, "rotary_cos"},
    {UMFA_FORWARD_ROTARY_SIN, "rotary_sin"},
    {UMFA_FORWARD_QV, "qv"},
};

struct Shape {
    int d, dv, bk, qf, simdgroups, split;
    bool one_tile;
    int first_family, last_family;
};
#define UMFA_ROW(...) {__VA_ARGS__},
constexpr Shape shapes_16[] = {UMFA_FORWARD_SHAPES_16(UMFA_ROW)};
constexpr Shape shapes_32[] = {UMFA_FORWARD_SHAPES_32(UMFA_ROW)};
#undef UMFA_ROW

template <size_t N>
const Shape* first_fit(const Shape (&shapes)[N], const Problem& problem, int family) {
    for (const Shape& shape : shapes)
        if (shape.d >= problem.head_dim && shape.dv >= problem.head_dim_v &&
            shape.first_family <= family && family <= shape.last_family)
            return &shape;
    return nullptr;
}

/// One threadgroup for each block of queries of each sequence.
std::vector<SequenceTask> tasks_of(const Problem& problem, const Chosen& chosen, int block_q) {
    std::vector<SequenceTask> tasks;
    for (const int64_t b : chosen)
        for (int64_t row = 0; row < problem.sequence(b).seqlen_q; row += block_q)
            tasks.push_back({static_cast<int32_t>(b), static_cast<int32_t>(row), 0, 0});
    return tasks;
}

/// Adds the launch for the chosen indices of the batch, as plan_decode.
void plan_tiles(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages) {
    const ElementType type = element_type(problem, gpu);
    const int family = static_cast<int>(gpu.family);
    const Shape* usual = type.operand_bytes == 2 ? first_fit(shapes_16, problem, family)
                                                 : first_fit(shapes_32, problem, family);
    if (!usual)
        fail(ErrorKind::internal, problem.function, "no tile shape",
             std::to_string(std::max(problem.head_dim, problem.head_dim_v)),
             "one in forward_shapes.h for every head_dim");
    Shape shape = *usual;
    const Simdgroups simdgroups = fit_simdgroups(shape.simdgroups, shape.split, gpu);
    shape.simdgroups = simdgroups.count;
    const int block_q = 8 * shape.qf * shape.simdgroups / shape.split;

    LaunchBuilder builder(plan, problem.function, constants_of(problem, results),
                          std::string("forward_") + type.name + "_d" + std::to_string(shape.d) +
                              "_v" + std::to_string(shape.dv) + "_k" + std::to_string(shape.bk) +
                              simdgroups.suffix,
                          "forward.metal", UMFA_FORWARD_BUFFERS);
    builder.computes(type)
        .shape(shape.d, shape.dv, shape.bk, shape.qf, shape.simdgroups, shape.split, shape.one_tile)
        .tensors(layout)
        .params(UMFA_FORWARD_PARAMS, forward_params(problem, results))
        .grid((problem.seqlen_q + block_q - 1) / block_q, problem.nheads_q, problem.batch)
        .simdgroups(shape.simdgroups)
        .threadgroup_bytes(forward_bytes(shape.d, shape.dv, shape.bk, shape.qf, shape.simdgroups,
                                         shape.split, shape.one_tile, type.operand_bytes));
    if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks = tasks_of(problem, chosen, block_q);
        builder.new_data(UMFA_FORWARD_SEQUENCES, sequence_params(problem))
            .new_data(UMFA_FORWARD_TASKS, tasks)
            .data(UMFA_FORWARD_PAGES, pages)
            .grid(static_cast<int64_t>(tasks.size()), problem.nheads_q);
    }
    builder.add();
}

}  // namespace

Verdict can_plan_forward(const Problem& problem) {
    if (const uint32_t missing = problem.features() & ~forward_features)
        return {false, std::string(name_of(static_cast<Feature>(missing & -missing))) +
                           " is not implemented"};
    return {};
}

LaunchPlan plan_forward(const Problem& problem, const ForwardResults& results,
                        const Capabilities& gpu) {
    LaunchPlan plan;
    plan.tensors = tensors_of(problem, results);
    std::optional<uint32_t> pages;
    if (problem.batch > 0) pages = add_pages(plan, problem);
    if (problem.append) plan_append(plan, problem, results, pages);
    if (problem.nheads_q == 0) return plan;
    if (problem.sequences.given) plan_unused_rows(plan, problem, results);
    // Sequences with few queries among others with many are still decoded.
    Chosen few, many;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const int64_t seqlen_q = problem.sequence(b).seqlen_q;
        if (seqlen_q > 0) (is_decode(problem, seqlen_q) ? few : many).push_back(b);
    }
    if (!many.empty()) plan_tiles(plan, problem, results, gpu, many, pages);
    if (!few.empty()) plan_decode(plan, problem, results, gpu, few, pages);
    return plan;
}

}  // namespace umfa::metal
