#include "metal/plan_decode.h"

#include <algorithm>

#include "metal/launch_builder.h"
#include "shared/decode_shapes.h"
#include "shared/indices.h"
#include "shared/threadgroup_memory.h"

namespace umfa::metal {
namespace {

// The sinks are bound by the kernel that divides.
constexpr Slot layout[] = {
    {UMFA_DECODE_QUERY, "query"},
    {UMFA_DECODE_KEY, "key"},
    {UMFA_DECODE_VALUE, "value"},
    {UMFA_DECODE_OUT, "out"},
    {UMFA_DECODE_LSE, "lse"},
    {UMFA_DECODE_MASK, "attn_mask"},
    {UMFA_DECODE_SLOPES, "alibi_slopes"},
    {UMFA_DECODE_ROTARY_COS, "rotary_cos"},
    {UMFA_DECODE_ROTARY_SIN, "rotary_sin"},
};
constexpr Slot merge_layout[] = {
    {UMFA_MERGE_OUT, "out"},
    {UMFA_MERGE_LSE, "lse"},
    {UMFA_MERGE_SINKS, "learnable_sink"},
};

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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

/// Query heads of a key head.
int64_t group_of(const Problem& problem) {
    return problem.nheads_q / std::max<int64_t>(problem.nheads_kv, 1);
}

/// Rows of a key head.
int64_t rows_of(const Problem& problem, int64_t seqlen_q) { return group_of(problem) * seqlen_q; }

/// Number of blocks of rows; a threadgroup computes one block.
int64_t blocks_of(const Problem& problem, int64_t seqlen_q, const Shape& shape) {
    return ceil_div(rows_of(problem, seqlen_q), 8 * shape.qf);
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
    int64_t first = span_begin(visible, int64_t{0});
    if (problem.dropout) first = first / 8 * 8;  // as decode.metal's first_key_of
    return {first, std::max(first, span_end(visible, rows.seqlen_q - 1))};
}

/// How the keys are split.
struct Split {
    int64_t count;  // of the longest sequence
    int64_t keys;   // of each
};

/// The keys that any query sees, in pieces of whole rounds of the simdgroups: as many as the caller
/// allows or as fill the GPU, equal also where sequences are not.
Split split_keys(const Problem& problem, const Capabilities& gpu, const Chosen& chosen,
                 const Shape& shape) {
    int64_t keys = 0, work = 0;  // of the longest sequence; of all, in keys of a threadgroup
    for (const int64_t b : chosen) {
        const int64_t own = keys_of(problem, b).size();
        keys = std::max(keys, own);
        work += own * problem.nheads_kv * blocks_of(problem, problem.sequence(b).seqlen_q, shape);
    }
    const int64_t filling =
        std::max<int64_t>(gpu.cores * threadgroups_per_core * keys / std::max<int64_t>(work, 1), 1);
    const int64_t wanted = problem.num_splits > 0
                               ? problem.num_splits
                               : std::clamp<int64_t>(keys / min_keys_per_split, 1, filling);
    const int64_t round = 8 * shape.simdgroups;
    const int64_t each = std::max(round, ceil_div(ceil_div(keys, wanted), round) * round);
    return {std::max<int64_t>(1, ceil_div(keys, each)), each};
}

/// Where sequences lie, and how many partial results theirs are. Empty where none are given.
struct Places {
    std::vector<SequenceParams> sequences;
    std::optional<uint32_t> data;  // the same, as data of the plan
    int64_t parts = 0;
};

Places places_of(LaunchPlan& plan, const Problem& problem, const Chosen& chosen,
                 const Split& split) {
    Places places;
    if (!problem.sequences.given) return places;
    places.sequences = sequence_params(problem);
    for (const int64_t b : chosen) {
        SequenceParams& own = places.sequences[static_cast<size_t>(b)];
        own.splits = static_cast<int32_t>(
            std::max<int64_t>(1, ceil_div(keys_of(problem, b).size(), split.keys)));
        own.part = places.parts;
        places.parts += problem.nheads_q * own.seqlen_q * own.splits;
    }
    places.data = add_data(plan, places.sequences);
    return places;
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

DecodeParams decode_params(const Problem& problem, const ForwardResults& results,
                           const Split& split) {
    DecodeParams params{};
    params.forward = forward_params(problem, results);
    params.first_key = static_cast<int32_t>(keys_of(problem, 0).first);  // where there is no list
    params.last_key = static_cast<int32_t>(keys_of(problem, 0).last);
    params.keys_per_split = static_cast<int32_t>(split.keys);
    params.splits = static_cast<int32_t>(split.count);
    params.heads = static_cast<int32_t>(problem.nheads_q);
    return params;
}

/// The launch that attends, without its grid, the places of sequences and what splits need.
LaunchBuilder decode_launch(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                            const Capabilities& gpu, const Shape& shape, const std::string& suffix,
                            const Split& split) {
    const ElementType type = element_type(problem, gpu);
    LaunchBuilder builder(plan, problem.function, constants_of(problem, results),
                          std::string("decode_") + type.name + "_d" + std::to_string(shape.d) +
                              "_v" + std::to_string(shape.dv) + "_q" + std::to_string(shape.qf) +
                              suffix,
                          "decode.metal", UMFA_DECODE_BUFFERS);
    builder.computes(type)
        .shape(shape.d, shape.dv, shape.qf, shape.simdgroups)
        .tensors(layout)
        .constant(constant::wide_mask, false)  // a range of keys may begin at an odd one
        .params(UMFA_DECODE_PARAMS, decode_params(problem, results, split))
        .simdgroups(shape.simdgroups)
        .threadgroup_bytes(
            decode_bytes(shape.d, shape.dv, shape.qf, shape.simdgroups, type.operand_bytes));
    return builder;
}

MergeParams merge_params(const Problem& problem, const ForwardResults& results,
                         const Split& split) {
    MergeParams params{};
    params.out = strides_of(results.out);
    if (results.lse) params.lse = strides_of(*results.lse);
    if (problem.sinks) params.sink = problem.sinks->logits.strides[0];
    params.heads = static_cast<int32_t>(problem.nheads_q);
    params.seqlen_q = static_cast<int32_t>(problem.seqlen_q);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);
    params.splits = static_cast<int32_t>(split.count);
    params.dropout_factor = dropout_params(problem).factor;
    return params;
}

void plan_merge(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                const Capabilities& gpu, const Chosen& chosen, const Split& split,
                const Places& places) {
    const ElementType type = stored_type(problem.out_dtype);
    const int channels = problem.head_dim_v <= 128 ? 128 : 256;
    const Simdgroups simdgroups = fit_simdgroups(merge_simdgroups, 1, gpu);
    LaunchBuilder merge(plan, problem.function, constants_of(problem, results),
                        std::string("decode_merge_") + type.name + "_d" + std::to_string(channels) +
                            simdgroups.suffix,
                        "decode.metal", UMFA_MERGE_BUFFERS);
    merge.macro("UMFA_MERGES", "1")
        .stores(type)
        .shape(simdgroups.count, channels / 32)
        .constant(constant::is_split, true)
        .tensors(merge_layout)
        .scratch(UMFA_MERGE_PARTIAL_OUT, 0)
        .scratch(UMFA_MERGE_PARTIAL_STATE, 1)
        .params(UMFA_MERGE_PARAMS, merge_params(problem, results, split))
        .grid(problem.seqlen_q, problem.nheads_q, problem.batch)
        .simdgroups(simdgroups.count)
        .threadgroup_bytes(merge_bytes(simdgroups.count, channels / 32));
    if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks = merge_tasks(places.sequences, chosen);
        merge.data(UMFA_MERGE_SEQUENCES, places.data)
            .new_data(UMFA_MERGE_TASKS, tasks)
            .grid(static_cast<int64_t>(tasks.size()), problem.nheads_q);
    }
    merge.add();
}

}  // namespace

bool is_decode(const Problem& problem, int64_t seqlen_q) {
    // Keys are rotated, and values meet queries, where they are staged.
    if ((problem.rotary && problem.rotary->keys) || problem.qv) return false;
    // Rows of the full-length kernel are computed by themselves; splits of the keys round otherwise.
    if (problem.batch_invariant) return false;
    return seqlen_q <= max_queries && shape_of(problem, rows_of(problem, seqlen_q));
}

void plan_decode(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages) {
    int64_t seqlen_q = 0;  // the longest
    for (const int64_t b : chosen) seqlen_q = std::max(seqlen_q, problem.sequence(b).seqlen_q);
    Shape shape = *shape_of(problem, rows_of(problem, seqlen_q));
    const Simdgroups simdgroups = fit_simdgroups(shape.simdgroups, 2, gpu);
    shape.simdgroups = simdgroups.count;
    const Split split = split_keys(problem, gpu, chosen, shape);
    const Places places = places_of(plan, problem, chosen, split);

    LaunchBuilder decode =
        decode_launch(plan, problem, results, gpu, shape, simdgroups.suffix, split);
    if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks =
            decode_tasks(places.sequences, chosen, group_of(problem), 8 * shape.qf);
        decode.data(UMFA_DECODE_SEQUENCES, places.data)
            .new_data(UMFA_DECODE_TASKS, tasks)
            .data(UMFA_DECODE_PAGES, pages)
            .grid(static_cast<int64_t>(tasks.size()), problem.nheads_kv);
    } else {
        decode.grid(split.count, problem.nheads_kv * blocks_of(problem, seqlen_q, shape),
                    problem.batch);
    }
    if (split.count == 1) {
        decode.tensor({UMFA_DECODE_SINKS, "learnable_sink"}).add();
        return;
    }
    const int64_t parts = problem.sequences.given
                              ? places.parts
                              : problem.batch * problem.nheads_q * seqlen_q * split.count;
    plan.scratch_bytes = {static_cast<uint64_t>(parts * problem.head_dim_v) * sizeof(float),
                          static_cast<uint64_t>(parts) * 2 * sizeof(float)};
    decode
        .constant(constant::is_split, true)
        // The merge divides, so the sinks are its.
        .constant(constant::has_sinks, false)
        .scratch(UMFA_DECODE_PARTIAL_OUT, 0)
        .scratch(UMFA_DECODE_PARTIAL_STATE, 1)
        .add();
    plan_merge(plan, problem, results, gpu, chosen, split, places);
}

}  // namespace umfa::metal
