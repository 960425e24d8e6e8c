#include "metal/plan_forward.h"

#include <algorithm>

#include "metal/launch_builder.h"
#include "metal/plan_append.h"
#include "metal/plan_codes.h"
#include "metal/plan_decode.h"
#include "metal/plan_sequences.h"
#include "metal/plan_tables.h"
#include "metal/plan_tiles.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

/// One threadgroup for each block of queries of each sequence.
std::vector<SequenceTask> tasks_of(const Problem& problem, const Chosen& chosen, int block_q) {
    std::vector<SequenceTask> tasks;
    for (const int64_t b : chosen)
        for (int64_t row = 0; row < problem.sequence(b).seqlen_q; row += block_q)
            tasks.push_back({static_cast<int32_t>(b), static_cast<int32_t>(row), 0, 0});
    return tasks;
}

/// Keys that any of the rows reads: more where they are two ranges.
double keys_of(const Problem& problem, const SequenceRows& rows, int64_t first_row, int block_q) {
    const Visible<int64_t> visible = problem.visible_of(rows);
    const int64_t last_row = std::min(first_row + block_q, rows.seqlen_q) - 1;
    return static_cast<double>(
        std::max<int64_t>(0, span_end(visible, last_row) - span_begin(visible, first_row)));
}

/// Adds the launch for the chosen indices of the batch, as plan_decode.
void plan_tiles(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages) {
    const Tiles tiles = tiles_of(problem, gpu);
    const int block_q = tiles.rows();
    LaunchBuilder builder = tile_launch(plan, problem, results, gpu, tiles);
    builder.grid((problem.seqlen_q + block_q - 1) / block_q, problem.nheads_q, problem.batch);
    std::vector<SequenceTask> tasks;
    const bool by_tables = problem.sequences.tables.has_value();
    if (by_tables) {
        TaskShape shape;
        shape.block = block_q;
        const TablePlaces found = plan_tables(plan, problem, results, gpu, shape);
        builder.piece(UMFA_FORWARD_SEQUENCES, found.places)
            .piece(UMFA_FORWARD_TASKS, found.tasks)
            .piece(UMFA_FORWARD_PAGES, found.pages)
            .grid(found.task_count, problem.nheads_q);
    } else if (problem.sequences.given) {
        tasks = tasks_of(problem, chosen, block_q);
        builder.new_data(UMFA_FORWARD_SEQUENCES, sequence_params(problem))
            .new_data(UMFA_FORWARD_TASKS, tasks)
            .data(UMFA_FORWARD_PAGES, pages)
            .grid(static_cast<int64_t>(tasks.size()), problem.nheads_q);
    }
    const auto seconds = [&](double keys) { return tile_seconds(problem, tiles, keys, gpu); };
    builder.add(slices_of(
        builder.grid(), seconds(static_cast<double>(problem.seqlen_kv)), gpu, [&](uint32_t x) {
            if (by_tables) return seconds(static_cast<double>(problem.seqlen_kv));
            if (tasks.empty())
                return seconds(
                    keys_of(problem, problem.sequence(0), int64_t{x} * block_q, block_q));
            const SequenceTask& task = tasks[x];
            return seconds(
                keys_of(problem, problem.sequence(task.sequence), task.first_row, block_q));
        }));
}

/// All sequences go to one kernel, which the longest possible chooses: the host knows none of them.
void plan_by_tables(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                    const Capabilities& gpu) {
    add_tables(plan, problem);
    plan_clear_all(plan, problem, results);
    if (problem.batch == 0) return;
    if (problem.nheads_q == 0 || problem.seqlen_q == 0) {
        plan_tables(plan, problem, results, gpu, {});  // which checks the numbers
        return;
    }
    Chosen all;
    for (int64_t b = 0; b < problem.batch; ++b) all.push_back(b);
    if (is_decode(problem, problem.seqlen_q))
        plan_decode(plan, problem, results, gpu, all, {});
    else
        plan_tiles(plan, problem, results, gpu, all, {});
}

}  // namespace

Verdict can_plan_forward(const Problem& problem) {
    if (const uint32_t missing = problem.features() & ~forward_features)
        return {false, std::string(name_of(static_cast<Feature>(missing & -missing))) +
                           " is not implemented"};
    return can_plan_codes(problem);
}

LaunchPlan plan_forward(const Problem& problem, const ForwardResults& results,
                        const Capabilities& gpu) {
    LaunchPlan plan;
    plan.tensors = tensors_of(problem, results);
    if (problem.sequences.tables) {
        plan_by_tables(plan, problem, results, gpu);
        return plan;
    }
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
