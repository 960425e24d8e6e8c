#include "metal/plan_sequences.h"

#include <algorithm>

#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

/// Of one threadgroup: enough to be worth one, few enough that long gaps go to many.
constexpr int64_t rows_per_threadgroup = 16;

std::vector<UnusedRows> pieces_of(const std::vector<RowRange>& ranges) {
    std::vector<UnusedRows> pieces;
    for (const RowRange& range : ranges)
        for (int64_t done = 0; done < range.rows; done += rows_per_threadgroup)
            pieces.push_back(
                {range.batch, range.row + done,
                 static_cast<int32_t>(std::min(rows_per_threadgroup, range.rows - done)), 0});
    return pieces;
}

}  // namespace

std::vector<SequenceParams> sequence_params(const Problem& problem) {
    std::vector<SequenceParams> all;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const SequenceRows rows = problem.sequence(b);
        SequenceParams params{};
        params.query_batch = rows.query_batch;
        params.query_row = rows.query_row;
        params.kv_batch = rows.kv_batch;
        params.kv_row = rows.kv_row;
        params.pages = b * problem.sequences.pages_per_sequence;
        params.seqlen_q = static_cast<int32_t>(rows.seqlen_q);
        params.visibility = narrowed(problem.visible_of(rows));
        params.position_q = static_cast<int32_t>(rows.position_q);
        all.push_back(params);
    }
    return all;
}

std::optional<uint32_t> add_pages(LaunchPlan& plan, const Problem& problem) {
    if (problem.page_size == 0) return {};
    // Metal has no empty buffers; a table without pages is not read.
    if (problem.sequences.pages.empty()) return add_data(plan, std::vector<int32_t>{0});
    return add_data(plan, problem.sequences.pages);
}

void plan_unused_rows(LaunchPlan& plan, const Problem& problem, const ForwardResults& results) {
    const std::vector<UnusedRows> unused = pieces_of(problem.unused_rows());
    if (unused.empty()) return;
    ClearParams params{};
    params.out = strides_of(results.out);
    if (results.lse) params.lse = strides_of(*results.lse);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);

    constexpr Slot layout[] = {{UMFA_CLEAR_OUT, "out"}, {UMFA_CLEAR_LSE, "lse"}};
    const ElementType type = stored_type(problem.out_dtype);
    LaunchBuilder(plan, problem.function, constants_of(problem, results),
                  std::string("clear_") + type.name, "clear.metal", UMFA_CLEAR_BUFFERS)
        .stores(type)
        .tensors(layout)
        .new_data(UMFA_CLEAR_ROWS, unused)
        .params(UMFA_CLEAR_PARAMS, params)
        .grid(static_cast<int64_t>(unused.size()), problem.nheads_q)
        .simdgroups(4)
        .add();
}

}  // namespace umfa::metal
