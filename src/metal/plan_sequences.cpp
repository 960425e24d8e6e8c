#include "metal/plan_sequences.h"

#include <algorithm>

#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

constexpr int64_t rows_per_threadgroup = UMFA_CLEARED_ROWS;

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

void plan_cleared_rows(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                       const char* name, const std::vector<RowRange>& rows, int64_t nheads,
                       int64_t channels) {
    const std::vector<UnusedRows> unused = pieces_of(rows);
    if (unused.empty() || nheads == 0) return;
    ClearParams params{};
    params.out = strides_of(results.out);
    if (results.lse) params.lse = strides_of(*results.lse);
    params.head_dim_v = static_cast<int32_t>(channels);

    const ElementType type = stored_type(results.out.view.dtype);
    LaunchBuilder(plan, problem.function, constants_of(problem, results),
                  std::string("clear_") + type.name, "clear.metal", UMFA_CLEAR_BUFFERS)
        .stores(type)
        .tensor({UMFA_CLEAR_OUT, name})
        .tensor({UMFA_CLEAR_LSE, "lse"})
        .new_data(UMFA_CLEAR_ROWS, unused)
        .params(UMFA_CLEAR_PARAMS, params)
        .grid(static_cast<int64_t>(unused.size()), nheads)
        .simdgroups(4)
        .add();
}

void plan_unused_rows(LaunchPlan& plan, const Problem& problem, const ForwardResults& results) {
    plan_cleared_rows(plan, problem, results, "out", problem.unused_rows(), problem.nheads_q,
                      problem.head_dim_v);
}

std::vector<RowRange> unused_key_rows(const Problem& problem) {
    const TensorView& view = problem.key.view;
    const int64_t batches = view.ndim == 4 ? view.shape[0] : 1;
    const int64_t rows = view.shape[view.ndim - 3];  // sequences come in the layout bshd
    std::vector<SequenceRows> used = problem.sequences.rows;
    std::sort(used.begin(), used.end(), [](const SequenceRows& a, const SequenceRows& b) {
        return a.kv_batch != b.kv_batch ? a.kv_batch < b.kv_batch : a.kv_row < b.kv_row;
    });
    std::vector<RowRange> found;
    auto next = used.begin();
    for (int64_t batch = 0; batch < batches; ++batch) {
        int64_t at = 0;  // the first row that is not accounted for
        for (; next != used.end() && next->kv_batch == batch; ++next) {
            if (next->seqlen_kv == 0) continue;
            if (at < next->kv_row) found.push_back({batch, at, next->kv_row - at});
            at = std::max(at, next->kv_row + next->seqlen_kv);
        }
        if (at < rows) found.push_back({batch, at, rows - at});
    }
    return found;
}

}  // namespace umfa::metal
