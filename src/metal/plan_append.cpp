#include "metal/plan_append.h"

#include "shared/indices.h"

namespace umfa::metal {
namespace {

/// Of one threadgroup, whose threads a single row would leave without work.
constexpr int64_t rows_per_threadgroup = 8;

AppendParams append_params(const Problem& problem) {
    const Append& append = *problem.append;
    AppendParams params{};
    params.key = strides_of(problem.key);
    params.value = strides_of(problem.value);
    params.new_key = strides_of(append.key);
    params.new_value = strides_of(append.value);
    params.rotary = rotary_params(problem);
    params.rows = static_cast<int32_t>(append.rows);
    params.rows_per_threadgroup = static_cast<int32_t>(rows_per_threadgroup);
    params.page_size = static_cast<int32_t>(problem.page_size);
    params.head_dim = static_cast<int32_t>(problem.head_dim);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);
    return params;
}

}  // namespace

void plan_append(LaunchPlan& plan, const Problem& problem, uint32_t pages) {
    const Append& append = *problem.append;
    if (problem.batch == 0 || problem.nheads_kv == 0 || append.rows == 0) return;
    const ElementType stored = element_type(problem.key.view.dtype, {Family::apple10});
    KernelLaunch launch;
    launch.kernel = std::string("append_") + stored.name;
    launch.source = "append.metal";
    launch.macros = {{"UMFA_KERNEL", "\"" + launch.kernel + "\""}, {"UMFA_T", stored.storage}};
    add_constants(launch, problem);
    // The new rows have channel strides of their own.
    set_constant(launch, UMFA_CONSTANT_UNIT_CHANNELS,
                 problem.key.stride_channel == 1 && problem.value.stride_channel == 1 &&
                     append.key.stride_channel == 1 && append.value.stride_channel == 1);
    bind_append(launch, problem);
    bind_rotary(launch, problem);
    bind_data(launch, UMFA_BUFFER_SEQUENCES, add_data(plan, sequence_params(problem)));
    bind_pages(launch, problem, pages);
    set_params(launch, UMFA_BUFFER_PARAMS, append_params(problem));
    launch.grid = {
        static_cast<uint32_t>((append.rows + rows_per_threadgroup - 1) / rows_per_threadgroup),
        static_cast<uint32_t>(problem.nheads_kv), static_cast<uint32_t>(problem.batch)};
    launch.threadgroup = {128, 1, 1};
    plan.launches.push_back(std::move(launch));
}

}  // namespace umfa::metal
