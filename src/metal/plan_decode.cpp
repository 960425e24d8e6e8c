#include "metal/plan_decode.h"

#include <algorithm>

#include "metal/launch_builder.h"
#include "metal/plan_codes.h"
#include "metal/plan_tables.h"
#include "metal/plan_tiles.h"
#include "shared/decode_shapes.h"
#include "shared/indices.h"
#include "shared/threadgroup_memory.h"

namespace umfa::metal {
namespace {

constexpr Slot layout[] = {
    {UMFA_DECODE_QUERY, "query"},
    {UMFA_DECODE_KEY, "key"},
    {UMFA_DECODE_VALUE, "value"},
    {UMFA_DECODE_OUT, "out"},
    {UMFA_DECODE_LSE, "lse"},
    {UMFA_DECODE_MASK, "attn_mask"},
    {UMFA_DECODE_SLOPES, "alibi_slopes"},
    {UMFA_DECODE_SINKS, "learnable_sink"},
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
/// Of the kernel for a single row, which has no fragments of queries.
#define UMFA_ROW(D, DV, SIMDGROUPS) {D, DV, 0, SIMDGROUPS},
constexpr Shape vector_shapes[] = {UMFA_VECTOR_SHAPES(UMFA_ROW)};
#undef UMFA_ROW

bool is_vector(const Shape& shape) { return shape.qf == 0; }

/// Rows of a threadgroup.
int rows_of(const Shape& shape) { return is_vector(shape) ? 1 : 8 * shape.qf; }

/// Beyond, tiles of the full-length kernel are filled well enough (MLX and PyTorch draw the line at
/// the same length).
constexpr int64_t max_queries = 8;
/// Below, writing and merging the partial results costs more than the longer loop.
constexpr int64_t min_keys_per_split = 128;
/// Simdgroups of a threadgroup that merges; each takes every eighth split.
constexpr int merge_simdgroups = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const Shape* shape_of(const Problem& problem, int64_t rows) {
    const auto holds = [&](const Shape& shape) {
        return shape.d >= problem.head_dim && shape.dv >= problem.head_dim_v;
    };
    for (const Shape& shape : vector_shapes)
        if (rows == 1 && holds(shape)) return &shape;
    const Shape* found = nullptr;
    for (const Shape& shape : shapes) {
        if (!holds(shape)) continue;
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

/// What a threadgroup takes at once.
struct Block {
    int rows;        // of a key head
    int keys;        // of its simdgroups together
    int alignment;   // of the first key
    int simdgroups;  // of the threadgroup
};

Block block_of(const Problem& problem, const Shape& shape) {
    // As decode_rows.h's first_key_of.
    return {rows_of(shape), 8 * shape.simdgroups, problem.dropout ? 8 : 1, shape.simdgroups};
}
Block block_of(const Tiles& tiles) { return {tiles.rows(), tiles.bk, tiles.bk, tiles.simdgroups}; }

/// Number of blocks of rows; a threadgroup computes one block.
int64_t blocks_of(const Problem& problem, int64_t seqlen_q, const Block& block) {
    return ceil_div(rows_of(problem, seqlen_q), block.rows);
}

/// Keys that any query of a sequence sees.
struct Range {
    int64_t first = 0, last = 0;
    int64_t size() const { return last - first; }
};

Range keys_of(const Problem& problem, int64_t b, const Block& block) {
    const SequenceRows rows = problem.sequence(b);
    if (rows.seqlen_q == 0) return {};
    const Visible<int64_t> visible = problem.visible_of(rows);
    const int64_t first = span_begin(visible, int64_t{0}) / block.alignment * block.alignment;
    return {first, std::max(first, span_end(visible, rows.seqlen_q - 1))};
}

/// How the keys are split.
struct Split {
    int64_t count;  // of the longest sequence
    int64_t keys;   // of each
};

/// Threadgroups that fill the GPU. One that counts has 4 simdgroups.
int64_t filling_threadgroups(const Capabilities& gpu, const Block& block) {
    return gpu.cores *
           std::max<int64_t>(1, 4 * gpu.decode_threadgroups_per_core / block.simdgroups);
}

/// The keys that any query sees, in pieces of whole rounds of the simdgroups: as many as the caller
/// allows or as fill the GPU, equal also where sequences are not.
Split split_keys(const Problem& problem, const Capabilities& gpu, const Chosen& chosen,
                 const Block& block) {
    int64_t keys = 0, work = 0;  // of the longest sequence; of all, in keys of a threadgroup
    for (const int64_t b : chosen) {
        const int64_t own = keys_of(problem, b, block).size();
        keys = std::max(keys, own);
        work += own * problem.nheads_kv * blocks_of(problem, problem.sequence(b).seqlen_q, block);
    }
    const int64_t threadgroups = filling_threadgroups(gpu, block);
    const int64_t filling = std::max<int64_t>(threadgroups * keys / std::max<int64_t>(work, 1), 1);
    const int64_t wanted = problem.num_splits > 0
                               ? problem.num_splits
                               : std::clamp<int64_t>(keys / min_keys_per_split, 1, filling);
    const int64_t round = block.keys;
    const int64_t each = std::max(round, ceil_div(ceil_div(keys, wanted), round) * round);
    return {std::max<int64_t>(1, ceil_div(keys, each)), each};
}

/// The most splits of a sequence where a kernel splits, by the same rule: it knows how long they are.
int64_t most_splits(const Problem& problem, const Capabilities& gpu, const Block& block) {
    const int64_t keys = problem.seqlen_kv;
    if (problem.num_splits > 0)
        return std::max<int64_t>(1, std::min(problem.num_splits, ceil_div(keys, block.keys)));
    const int64_t filling =
        filling_threadgroups(gpu, block) / std::max<int64_t>(problem.nheads_kv, 1);
    return std::clamp<int64_t>(keys / min_keys_per_split, 1, std::max<int64_t>(filling, 1));
}

Split split_of(const Problem& problem, const Capabilities& gpu, const Chosen& chosen,
               const Block& block) {
    Split split = split_keys(problem, gpu, chosen, block);
    if (problem.sequences.tables) split.count = most_splits(problem, gpu, block);
    return split;
}

TaskShape task_shape(const Problem& problem, const Capabilities& gpu, const Block& block,
                     const Split& split) {
    TaskShape shape;
    shape.group = group_of(problem);
    shape.block = block.rows;
    shape.alignment = block.alignment;
    shape.round = block.keys;
    shape.splits = split.count > 1 ? problem.num_splits : 1;
    shape.least_keys = min_keys_per_split;
    shape.threadgroups = filling_threadgroups(gpu, block);
    shape.most_splits = split.count;
    shape.merges = split.count > 1;
    return shape;
}

/// Where sequences lie, and how many partial results theirs are. Empty where none are given.
struct Places {
    std::vector<SequenceParams> sequences;
    std::optional<uint32_t> data;  // the same, as data of the plan
    int64_t parts = 0;
    std::optional<TablePlaces> by_kernel;  // in place of these, where a kernel finds them
};

Places places_of(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const Capabilities& gpu, const Chosen& chosen, const Block& block,
                 const Split& split) {
    Places places;
    if (!problem.sequences.given) return places;
    if (problem.sequences.tables) {
        places.by_kernel =
            plan_tables(plan, problem, results, gpu, task_shape(problem, gpu, block, split));
        // Each of a query's rows has a part in each of its block's tasks.
        places.parts = problem.nheads_q * problem.seqlen_q * places.by_kernel->task_count;
        return places;
    }
    places.sequences = sequence_params(problem);
    for (const int64_t b : chosen) {
        SequenceParams& own = places.sequences[static_cast<size_t>(b)];
        own.splits = static_cast<int32_t>(
            std::max<int64_t>(1, ceil_div(keys_of(problem, b, block).size(), split.keys)));
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
                           const Block& block, const Split& split) {
    DecodeParams params{};
    params.forward = forward_params(problem, results);
    const Range keys = keys_of(problem, 0, block);  // where there is no list
    params.first_key = static_cast<int32_t>(keys.first);
    params.last_key = static_cast<int32_t>(keys.last);
    params.keys_per_split = static_cast<int32_t>(split.keys);
    params.splits = static_cast<int32_t>(split.count);
    params.heads = static_cast<int32_t>(problem.nheads_q);
    return params;
}

double row_bytes(const Operand& operand) {
    const TensorView& view = operand.view;
    return static_cast<double>(view.shape[view.ndim - 1] * bits_of(view.dtype)) / 8;
}

/// The launch that attends, without its grid, the places of sequences and what splits need.
LaunchBuilder decode_launch(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                            const Capabilities& gpu, const Shape& shape, const std::string& suffix,
                            const Split& split) {
    const ElementType type = element_type(problem, gpu);
    const std::string named =
        std::string(type.name) + "_d" + std::to_string(shape.d) + "_v" + std::to_string(shape.dv);
    LaunchBuilder builder(
        plan, problem.function, constants_of(problem, results),
        is_vector(shape) ? "decode_vector_" + named + suffix
                         : "decode_" + named + "_q" + std::to_string(shape.qf) + suffix,
        is_vector(shape) ? "decode_vector.metal" : "decode.metal", UMFA_DECODE_BUFFERS);
    builder.computes(type);
    if (is_vector(shape))
        builder.shape(shape.d, shape.dv, shape.simdgroups)
            .threadgroup_bytes(vector_bytes(shape.dv, shape.simdgroups));
    else
        builder.shape(shape.d, shape.dv, shape.qf, shape.simdgroups)
            .threadgroup_bytes(
                decode_bytes(shape.d, shape.dv, shape.qf, shape.simdgroups, type.operand_bytes));
    builder.constant(constant::whole_channels, has_dims(problem, shape.d, shape.dv))
        .tensors(layout)
        .constant(constant::wide_mask, false)  // a range of keys may begin at an odd one
        .params(UMFA_DECODE_PARAMS,
                decode_params(problem, results, block_of(problem, shape), split))
        .simdgroups(shape.simdgroups);
    bind_codes(builder, problem, decode_codes);
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

/// Numbers of the partial results in the plan's scratch memory.
struct SplitScratch {
    uint32_t out, state;
};

void plan_merge(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                const Capabilities& gpu, const Chosen& chosen, const Split& split,
                const Places& places, const SplitScratch& scratch) {
    const ElementType type = stored_type(problem.out_dtype);
    const int channels = problem.head_dim_v <= 128 ? 128 : problem.head_dim_v <= 256 ? 256 : 512;
    const Simdgroups simdgroups = fit_simdgroups(merge_simdgroups, 1, gpu);
    LaunchBuilder merge(plan, problem.function, constants_of(problem, results),
                        std::string("decode_merge_") + type.name + "_d" + std::to_string(channels) +
                            simdgroups.suffix,
                        "decode.metal", UMFA_MERGE_BUFFERS);
    merge.macro("UMFA_MERGES", "1")
        .stores(type)
        .shape(simdgroups.count, channels / 32)
        .tensors(merge_layout)
        .scratch(UMFA_MERGE_PARTIAL_OUT, scratch.out)
        .scratch(UMFA_MERGE_PARTIAL_STATE, scratch.state)
        .params(UMFA_MERGE_PARAMS, merge_params(problem, results, split))
        .grid(problem.seqlen_q, problem.nheads_q, problem.batch)
        .simdgroups(simdgroups.count)
        .threadgroup_bytes(merge_bytes(simdgroups.count, channels / 32));
    if (places.by_kernel) {
        merge.piece(UMFA_MERGE_SEQUENCES, places.by_kernel->places)
            .piece(UMFA_MERGE_TASKS, places.by_kernel->rows)
            .grid(places.by_kernel->row_count, problem.nheads_q);
    } else if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks = merge_tasks(places.sequences, chosen);
        merge.data(UMFA_MERGE_SEQUENCES, places.data)
            .new_data(UMFA_MERGE_TASKS, tasks)
            .grid(static_cast<int64_t>(tasks.size()), problem.nheads_q);
    }
    merge.add();
}

/// The place of what splits need in a kernel's layout.
struct SplitSlots {
    uint32_t sequences, tasks, pages, partial_out, partial_state;
};

/// Adds a launch of `seconds` for each threadgroup, and if the keys are split the merge.
void add_split(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
               const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages,
               LaunchBuilder launch, const SplitSlots& slots, const Block& block,
               const Split& split, const Places& places, double seconds) {
    int64_t seqlen_q = 0;  // the longest
    for (const int64_t b : chosen) seqlen_q = std::max(seqlen_q, problem.sequence(b).seqlen_q);
    if (places.by_kernel) {
        launch.piece(slots.sequences, places.by_kernel->places)
            .piece(slots.tasks, places.by_kernel->tasks)
            .piece(slots.pages, places.by_kernel->pages)
            .grid(places.by_kernel->task_count, problem.nheads_kv);
    } else if (problem.sequences.given) {
        const std::vector<SequenceTask> tasks =
            decode_tasks(places.sequences, chosen, group_of(problem), block.rows);
        launch.data(slots.sequences, places.data)
            .new_data(slots.tasks, tasks)
            .data(slots.pages, pages)
            .grid(static_cast<int64_t>(tasks.size()), problem.nheads_kv);
    } else {
        launch.grid(split.count, problem.nheads_kv * blocks_of(problem, seqlen_q, block),
                    problem.batch);
    }
    const std::vector<GridSlice> slices =
        slices_of(launch.grid(), seconds, gpu, [&](uint32_t) { return seconds; });
    // The kernel is the same with and without a split, so it has the buffers of both.
    int64_t parts = 0;
    if (split.count > 1)
        parts = problem.sequences.given ? places.parts
                                        : problem.batch * problem.nheads_q * seqlen_q * split.count;
    const SplitScratch scratch{
        add_scratch(plan, std::max<uint64_t>(static_cast<uint64_t>(parts * problem.head_dim_v), 1) *
                              sizeof(float)),
        add_scratch(plan, std::max<uint64_t>(static_cast<uint64_t>(parts), 1) * 2 * sizeof(float))};
    launch.scratch(slots.partial_out, scratch.out)
        .scratch(slots.partial_state, scratch.state)
        .add(slices);
    if (split.count > 1) plan_merge(plan, problem, results, gpu, chosen, split, places, scratch);
}

/// By tiles, whose rows are packed: all that is not for the decode kernel.
void plan_packed(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages) {
    constexpr SplitSlots slots{UMFA_FORWARD_SEQUENCES, UMFA_FORWARD_TASKS, UMFA_FORWARD_PAGES,
                               UMFA_FORWARD_PARTIAL_OUT, UMFA_FORWARD_PARTIAL_STATE};
    const Tiles tiles = tiles_of(problem, gpu);
    const Block block = block_of(tiles);
    const Split split = split_of(problem, gpu, chosen, block);
    const Places places = places_of(plan, problem, results, gpu, chosen, block, split);
    const SplitParams params{static_cast<int32_t>(split.keys), static_cast<int32_t>(split.count),
                             static_cast<int32_t>(problem.nheads_q), 0};
    LaunchBuilder launch = tile_launch(plan, problem, results, gpu, tiles);
    launch.constant(constant::packs_heads, true)
        .new_data(UMFA_FORWARD_SPLIT, std::vector<SplitParams>{params});
    add_split(plan, problem, results, gpu, chosen, pages, std::move(launch), slots, block, split,
              places, tile_seconds(problem, tiles, static_cast<double>(split.keys), gpu));
}

}  // namespace

bool is_decode(const Problem& problem, int64_t seqlen_q) {
    // Rows of the full-length kernel are computed by themselves; splits of the keys round otherwise.
    return seqlen_q <= max_queries && !problem.batch_invariant;
}

void plan_decode(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                 const Capabilities& gpu, const Chosen& chosen, std::optional<uint32_t> pages) {
    int64_t seqlen_q = 0;  // the longest
    for (const int64_t b : chosen) seqlen_q = std::max(seqlen_q, problem.sequence(b).seqlen_q);
    const Shape* usual = shape_of(problem, rows_of(problem, seqlen_q));
    // Keys are rotated, and values meet queries, where they are staged.
    const bool staged =
        problem.qv || (problem.rotary && problem.rotary->keys) || !decodes_codes(problem);
    if (!usual || staged) {
        plan_packed(plan, problem, results, gpu, chosen, pages);
        return;
    }
    constexpr SplitSlots slots{UMFA_DECODE_SEQUENCES, UMFA_DECODE_TASKS, UMFA_DECODE_PAGES,
                               UMFA_DECODE_PARTIAL_OUT, UMFA_DECODE_PARTIAL_STATE};
    Shape shape = *usual;
    const Simdgroups simdgroups = fit_simdgroups(shape.simdgroups, 2, gpu);
    shape.simdgroups = simdgroups.count;
    const Block block = block_of(problem, shape);
    const Split split = split_of(problem, gpu, chosen, block);
    const Places places = places_of(plan, problem, results, gpu, chosen, block, split);
    // Keys and values are read once; products of padding count too.
    const double keys = static_cast<double>(split.keys);
    const double seconds =
        core_seconds({2.0 * block.rows * keys * (shape.d + shape.dv),
                      keys * (row_bytes(problem.key) + row_bytes(problem.value))},
                     gpu);
    add_split(plan, problem, results, gpu, chosen, pages,
              decode_launch(plan, problem, results, gpu, shape, simdgroups.suffix, split), slots,
              block, split, places, seconds);
}

}  // namespace umfa::metal
