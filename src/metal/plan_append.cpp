#include "metal/plan_append.h"

#include <algorithm>

#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

constexpr Slot layout[] = {
    {UMFA_APPEND_KEY, "key"},
    {UMFA_APPEND_VALUE, "value"},
    {UMFA_APPEND_NEW_KEY, "new_key"},
    {UMFA_APPEND_NEW_VALUE, "new_value"},
    {UMFA_APPEND_ROTARY_COS, "rotary_cos"},
    {UMFA_APPEND_ROTARY_SIN, "rotary_sin"},
};

AppendParams append_params(const Problem& problem) {
    const Append& append = *problem.append;
    AppendParams params{};
    params.key = strides_of(problem.key);
    params.value = strides_of(problem.value);
    params.new_key = strides_of(append.key);
    params.new_value = strides_of(append.value);
    params.rotary = rotary_params(problem);
    params.pages = pages_param(problem);
    params.head_dim = static_cast<int32_t>(problem.head_dim);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);
    return params;
}

std::vector<AppendTask> append_tasks(const Problem& problem) {
    std::vector<AppendTask> tasks;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const SequenceRows sequence = problem.sequence(b);
        const int64_t first_key = sequence.seqlen_kv - sequence.new_rows;
        for (int64_t row = 0; row < sequence.new_rows; row += append_rows_per_threadgroup)
            tasks.push_back({sequence.new_batch, sequence.new_row + row, static_cast<int32_t>(b),
                             static_cast<int32_t>(first_key + row),
                             static_cast<int32_t>(
                                 std::min(append_rows_per_threadgroup, sequence.new_rows - row)),
                             static_cast<int32_t>(sequence.position_q + row)});
    }
    return tasks;
}

/// The launch, without its lists and its grid.
LaunchBuilder append_launch(LaunchPlan& plan, const Problem& problem,
                            const ForwardResults& results) {
    const Append& append = *problem.append;
    // The new rows have channel strides of their own.
    const bool unit_channels = problem.key.stride_channel == 1 &&
                               problem.value.stride_channel == 1 &&
                               append.key.stride_channel == 1 && append.value.stride_channel == 1;
    const DType dtypes[] = {problem.key.view.dtype, problem.value.view.dtype, append.key.view.dtype,
                            append.value.view.dtype};
    const bool one_dtype = std::ranges::all_of(dtypes, [&](DType x) { return x == dtypes[0]; });
    const auto kind = [&](int i) { return one_dtype ? UMFA_MASK_NONE : narrow_kind(dtypes[i]); };
    const ElementType type = stored_type(one_dtype ? dtypes[0] : DType::f32);
    LaunchBuilder builder(plan, problem.function, constants_of(problem, results),
                          std::string("append_") + type.name, "append.metal", UMFA_APPEND_BUFFERS);
    builder.stores(type)
        .constant(constant::unit_channels, unit_channels)
        .constant(constant::key_kind, kind(0))
        .constant(constant::value_kind, kind(1))
        .constant(constant::new_key_kind, kind(2))
        .constant(constant::new_value_kind, kind(3))
        .tensors(layout)
        .params(UMFA_APPEND_PARAMS, append_params(problem))
        .simdgroups(4);
    return builder;
}

}  // namespace

void plan_append(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 std::optional<uint32_t> pages) {
    const std::vector<AppendTask> tasks = append_tasks(problem);
    if (tasks.empty() || problem.nheads_kv == 0) return;
    append_launch(plan, problem, results)
        .new_data(UMFA_APPEND_SEQUENCES, sequence_params(problem))
        .new_data(UMFA_APPEND_TASKS, tasks)
        .data(UMFA_APPEND_PAGES, pages)
        .grid(static_cast<int64_t>(tasks.size()), problem.nheads_kv)
        .add();
}

void plan_append(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const TablePlaces& places) {
    if (places.append_count == 0 || problem.nheads_kv == 0) return;
    append_launch(plan, problem, results)
        .piece(UMFA_APPEND_SEQUENCES, places.places)
        .piece(UMFA_APPEND_TASKS, places.appends)
        .piece(UMFA_APPEND_PAGES, places.pages)
        .grid(places.append_count, problem.nheads_kv)
        .add();
}

}  // namespace umfa::metal
