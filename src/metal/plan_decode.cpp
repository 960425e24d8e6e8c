#include "metal/plan_decode.h"

#include <algorithm>

#include "metal/plan_parts.h"
#include "shared/decode_shapes.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

struct Shape {
    int d, dv, qf, simdgroups;
};
#define UMFA_ROW(...) {__VA_ARGS__},
constexpr Shape shapes[] = {UMFA_DECODE_SHAPES(UMFA_ROW)};
#undef UMFA_ROW

/// Beyond, tiles of the full-length kernel are filled well enough (MLX and PyTorch draw the line at
/// the same length).
constexpr int64_t max_queries = 8;
/// Threadgroups that a core holds at once: three of 128 threads, at about 120 registers a lane, fill
/// its 208 KB of registers. A fourth would only wait for one of them (H100, 16k keys, 32/8 heads: 44
/// us with four for each of its multiprocessors, which hold three as well).
constexpr int64_t threadgroups_per_core = 3;
/// Below, writing and merging the partial results costs more than the longer loop.
constexpr int64_t min_keys_per_split = 128;
/// Simdgroups of a threadgroup that merges; each takes every eighth split.
constexpr int merge_simdgroups = 8;

const Shape* shape_of(const Problem& problem, int64_t rows) {
    const Shape* found = nullptr;
    for (const Shape& shape : shapes) {
        if (shape.d < problem.head_dim || shape.dv < problem.head_dim_v) continue;
        if (found && (shape.d != found->d || shape.dv != found->dv)) break;
        found = &shape;
        if (8 * shape.qf >= rows) break;
    }
    return found;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Rows of a key head.
int64_t rows_of(const Problem& problem, int64_t seqlen_q) {
    return problem.nheads_q / std::max<int64_t>(problem.nheads_kv, 1) * seqlen_q;
}

/// Keys that any query of a sequence sees.
struct Range {
    int64_t first = 0, last = 0;
    int64_t size() const { return last - first; }
};

Range keys_of(const Problem& problem, int64_t b) {
    const SequenceRows rows = problem.sequence(b);
    if (rows.seqlen_q == 0) return {};
    const Visible<int64_t> visible = problem.visible_of(rows);
    int64_t first = visible_begin(visible, int64_t{0});
    if (problem.dropout) first = first / 8 * 8;  // as decode.metal's first_key_of
    return {first, std::max(first, visible_end(visible, rows.seqlen_q - 1))};
}

/// One threadgroup of each key head for each block of rows and piece of the keys of each sequence.
std::vector<SequenceTask> decode_tasks(const std::vector<SequenceParams>& sequences,
                                       const Chosen& chosen, int64_t group, int64_t block) {
    std::vector<SequenceTask> tasks;
    for (const int64_t b : chosen) {
        const SequenceParams& own = sequences[static_cast<size_t>(b)];
        for (int64_t row = 0; row < group * own.seqlen_q; row += block)
            for (int32_t split = 0; split < own.splits; ++split)
                tasks.push_back({static_cast<int32_t>(b), static_cast<int32_t>(row), split, 0});
    }
    return tasks;
}

/// One threadgroup of each head for each query.
std::vector<SequenceTask> merge_tasks(const std::vector<SequenceParams>& sequences,
                                      const Chosen& chosen) {
    std::vector<SequenceTask> tasks;
    for (const int64_t b : chosen)
        for (int32_t row = 0; row < sequences[static_cast<size_t>(b)].seqlen_q; ++row)
            tasks.push_back({static_cast<int32_t>(b), row, 0, 0});
    return tasks;
}

}  // namespace

bool is_decode(const Problem& problem, int64_t seqlen_q) {
    // Keys are rotated, and values meet queries, where they are staged.
    if ((problem.rotary && problem.rotary->keys) || problem.qv) return false;
    return seqlen_q <= max_queries && shape_of(problem, rows_of(problem, seqlen_q));
}

void plan_decode(LaunchPlan& plan, const Problem& problem, const Capabilities& gpu,
                 const Chosen& chosen, uint32_t pages) {
    const ElementType type = element_type(problem.query.view.dtype, gpu);
    int64_t seqlen_q = 0;  // the longest
    for (const int64_t b : chosen) seqlen_q = std::max(seqlen_q, problem.sequence(b).seqlen_q);
    const Shape& usual = *shape_of(problem, rows_of(problem, seqlen_q));
    Shape shape = usual;
    shape.simdgroups = fitting_simdgroups(shape.simdgroups, 2, gpu);
    const int64_t group = problem.nheads_q / problem.nheads_kv, block = 8 * shape.qf;

    // The keys that any query sees, in pieces of whole rounds of the simdgroups: as many as the
    // caller allows or as fill the GPU, equal also where sequences are not.
    int64_t keys = 0, work = 0;  // of the longest sequence; of all, in keys of a threadgroup
    for (const int64_t b : chosen) {
        const int64_t own = keys_of(problem, b).size();
        keys = std::max(keys, own);
        work += own * problem.nheads_kv * ceil_div(group * problem.sequence(b).seqlen_q, block);
    }
    const int64_t filling =
        std::max<int64_t>(gpu.cores * threadgroups_per_core * keys / std::max<int64_t>(work, 1), 1);
    const int64_t wanted = problem.num_splits > 0
                               ? problem.num_splits
                               : std::clamp<int64_t>(keys / min_keys_per_split, 1, filling);
    const int64_t round = 8 * shape.simdgroups;
    const int64_t keys_per_split = std::max(round, ceil_div(ceil_div(keys, wanted), round) * round);
    const int64_t splits = std::max<int64_t>(1, ceil_div(keys, keys_per_split));

    std::vector<SequenceParams> sequences;
    uint64_t partial_rows =
        static_cast<uint64_t>(problem.batch * problem.nheads_q * seqlen_q * splits);
    if (problem.sequences.given) {
        sequences = sequence_params(problem);
        int64_t part = 0;
        for (const int64_t b : chosen) {
            SequenceParams& own = sequences[static_cast<size_t>(b)];
            own.splits = static_cast<int32_t>(
                std::max<int64_t>(1, ceil_div(keys_of(problem, b).size(), keys_per_split)));
            own.part = part;
            part += problem.nheads_q * own.seqlen_q * own.splits;
        }
        partial_rows = static_cast<uint64_t>(part);
    }

    DecodeParams params{};
    params.forward = forward_params(problem);
    params.first_key = static_cast<int32_t>(keys_of(problem, 0).first);  // where there is no list
    params.last_key = static_cast<int32_t>(keys_of(problem, 0).last);
    params.keys_per_split = static_cast<int32_t>(keys_per_split);
    params.splits = static_cast<int32_t>(splits);
    params.heads = static_cast<int32_t>(problem.nheads_q);

    KernelLaunch decode;
    decode.kernel = std::string("decode_") + type.name + "_d" + std::to_string(shape.d) + "_v" +
                    std::to_string(shape.dv) + "_q" + std::to_string(shape.qf) +
                    fitted_suffix(shape.simdgroups, usual.simdgroups);
    decode.source = "decode.metal";
    decode.macros = {{"UMFA_KERNEL", "\"" + decode.kernel + "\""},
                     {"UMFA_T", type.storage},
                     {"UMFA_M", type.operand},
                     {"UMFA_SHAPE", list_of(shape.d, shape.dv, shape.qf, shape.simdgroups)}};
    add_constants(decode, problem);
    add_constant(decode, UMFA_CONSTANT_IS_SPLIT, splits > 1);
    bind_inputs(decode, problem);
    bind_outputs(decode, problem);
    set_params(decode, UMFA_BUFFER_PARAMS, params);
    decode.grid = {static_cast<uint32_t>(splits),
                   static_cast<uint32_t>(problem.nheads_kv * ceil_div(group * seqlen_q, block)),
                   static_cast<uint32_t>(problem.batch)};
    uint32_t places = 0;
    if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks = decode_tasks(sequences, chosen, group, block);
        places = add_data(plan, sequences);
        bind_data(decode, UMFA_BUFFER_SEQUENCES, places);
        bind_data(decode, UMFA_BUFFER_TASKS, add_data(plan, tasks));
        bind_pages(decode, problem, pages);
        decode.grid = {static_cast<uint32_t>(tasks.size()),
                       static_cast<uint32_t>(problem.nheads_kv), 1};
    }
    decode.threadgroup = {static_cast<uint32_t>(32 * shape.simdgroups), 1, 1};
    // As decode.metal declares it: O and state of half of the simdgroups, and Q where it is large.
    const int q_bytes = shape.d * type.operand_bytes <= 512 ? 8 : shape.qf * shape.d / 8 * 32 * 8;
    // Plus, for values.h, two words of flags for each 16 fragments of O and a first key each simdgroup.
    const int words = (shape.qf * shape.dv / 8 + 15) / 16;
    const int guards = 4 * (2 * words * 32 + 1) * shape.simdgroups;
    decode.threadgroup_bytes = static_cast<uint32_t>(
        shape.simdgroups / 2 * shape.qf * (shape.dv / 8 + 1) * 32 * 8 + q_bytes + guards);
    if (splits == 1) {
        bind_sinks(decode, problem);
        plan.launches.push_back(std::move(decode));
        return;
    }

    plan.scratch_bytes = {partial_rows * static_cast<uint64_t>(problem.head_dim_v) * sizeof(float),
                          partial_rows * 2 * sizeof(float)};
    bind_scratch(decode, UMFA_BUFFER_PARTIAL_OUT, 0);
    bind_scratch(decode, UMFA_BUFFER_PARTIAL_STATE, 1);
    // The merge divides, so the sinks are its.
    set_constant(decode, UMFA_CONSTANT_HAS_SINKS, false);
    plan.launches.push_back(std::move(decode));

    MergeParams merge_params{};
    merge_params.out = params.forward.out;
    merge_params.lse = params.forward.lse;
    merge_params.sink = params.forward.sink;
    merge_params.heads = params.heads;
    merge_params.seqlen_q = params.forward.seqlen_q;
    merge_params.head_dim_v = params.forward.head_dim_v;
    merge_params.splits = params.splits;
    merge_params.dropout_factor = params.forward.dropout.factor;

    const ElementType stored = element_type(problem.query.view.dtype, {Family::apple10});
    const int channels = problem.head_dim_v <= 128 ? 128 : 256;
    const int simdgroups = fitting_simdgroups(merge_simdgroups, 1, gpu);
    KernelLaunch merge;
    merge.kernel = std::string("decode_merge_") + stored.name + "_d" + std::to_string(channels) +
                   fitted_suffix(simdgroups, merge_simdgroups);
    merge.source = "decode.metal";
    merge.macros = {{"UMFA_KERNEL", "\"" + merge.kernel + "\""},
                    {"UMFA_MERGES", "1"},
                    {"UMFA_T", stored.storage},
                    {"UMFA_SHAPE", list_of(simdgroups, channels / 32)}};
    add_constants(merge, problem);
    add_constant(merge, UMFA_CONSTANT_IS_SPLIT, true);
    bind_outputs(merge, problem);
    bind_sinks(merge, problem);
    bind_scratch(merge, UMFA_BUFFER_PARTIAL_OUT, 0);
    bind_scratch(merge, UMFA_BUFFER_PARTIAL_STATE, 1);
    set_params(merge, UMFA_BUFFER_PARAMS, merge_params);
    merge.grid = {static_cast<uint32_t>(problem.seqlen_q), static_cast<uint32_t>(problem.nheads_q),
                  static_cast<uint32_t>(problem.batch)};
    if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks = merge_tasks(sequences, chosen);
        bind_data(merge, UMFA_BUFFER_SEQUENCES, places);
        bind_data(merge, UMFA_BUFFER_TASKS, add_data(plan, tasks));
        merge.grid = {static_cast<uint32_t>(tasks.size()), static_cast<uint32_t>(problem.nheads_q),
                      1};
    }
    merge.threadgroup = {static_cast<uint32_t>(32 * simdgroups), 1, 1};
    merge.threadgroup_bytes = static_cast<uint32_t>(simdgroups * (channels + 1) * sizeof(float));
    plan.launches.push_back(std::move(merge));
}

}  // namespace umfa::metal
