#include "cpu/decode.h"

#include <algorithm>
#include <memory>

#include "core/dtype.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

/// How many keys a part has: so many that there are at most num_splits parts; without num_splits,
/// at least 512 keys in at most 32 parts. The same on every machine, so that bits do not depend on
/// the number of threads.
int64_t keys_per_part(int64_t seqlen_kv, int64_t num_splits) {
    constexpr int64_t tile = 64;  // parts begin at multiples of the kernels' tile
    const int64_t tiles = std::max<int64_t>(1, (seqlen_kv + tile - 1) / tile);
    const int64_t parts = num_splits > 0 ? num_splits : 32;
    const int64_t keys = (tiles + parts - 1) / parts * tile;
    return num_splits > 0 ? keys : std::max<int64_t>(512, keys);
}

/// Keys [part * keys_per_part, ...) of the heads [head_begin, head_end) of a sequence.
struct Task {
    int64_t sequence, head_begin, head_end, key_begin, key_end;
    int64_t memory;  // of its partial result, in floats; -1: there is one part, and out is written
};

/// A row of the result to be merged from its parts.
struct Merge {
    int64_t sequence, row;  // (query head, query) in one number
    int64_t memory, stride, parts;
};

}  // namespace

void run_decode(const Problem& problem, const ForwardArgs& args, const DecodeKernel& kernel,
                const std::vector<int64_t>& batch_indices) {
    const int64_t row_floats = kernel.row_floats(args), heads = problem.nheads_kv;
    double pairs = 0;
    int64_t most_queries = 0, parts_in_all = 0;
    for (const int64_t b : batch_indices) {
        const Sequence& sequence = args.sequences[b];
        const int64_t keys = sequence.seqlen_kv, part = keys_per_part(keys, problem.num_splits);
        pairs +=
            static_cast<double>(problem.nheads_q * sequence.seqlen_q) * static_cast<double>(keys);
        most_queries = std::max(most_queries, sequence.seqlen_q);
        parts_in_all += std::max<int64_t>(1, (keys + part - 1) / part);
    }
    const int threads =
        threads_worth(pairs * static_cast<double>(score_channels(problem) + problem.head_dim_v));
    // A task takes as many heads as still leave each thread a few tasks.
    int64_t together = heads;
    while (together > 1 &&
           parts_in_all * ((heads + together - 1) / together) < int64_t{4} * threads)
        together /= 2;

    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t floats = 0;
    for (const int64_t b : batch_indices) {
        const Sequence& sequence = args.sequences[b];
        const int64_t keys = sequence.seqlen_kv;
        const int64_t part_keys = keys_per_part(keys, problem.num_splits);
        const int64_t parts = std::max<int64_t>(1, (keys + part_keys - 1) / part_keys);
        const int64_t head_floats = args.group * sequence.seqlen_q * row_floats;
        const int64_t stride = heads * head_floats;  // from one part to the next
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t head = 0; head < heads; head += together)
                tasks.push_back({b, head, std::min(heads, head + together), part * part_keys,
                                 std::min(keys, (part + 1) * part_keys),
                                 parts > 1 ? floats + part * stride + head * head_floats : -1});
        if (parts == 1) continue;
        for (int64_t row = 0; row < problem.nheads_q * sequence.seqlen_q; ++row)
            merges.push_back({b, row, floats + row * row_floats, stride, parts});
        floats += parts * stride;
    }
    // Up to 4 MiB, the parts of 32 heads over 16384 keys, are kept for the next call.
    std::unique_ptr<float[]> large;
    if (floats > (int64_t{1} << 20)) large.reset(new float[static_cast<size_t>(floats)]);
    float* memory = large ? large.get() : floats > 0 ? call_scratch(floats) : nullptr;
    const int64_t scratch = kernel.scratch_floats(args, together, most_queries);
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
        const Task& task = tasks[static_cast<size_t>(i)];
        kernel.run(args, task.sequence, task.head_begin, task.head_end, task.key_begin,
                   task.key_end, thread_scratch(scratch),
                   task.memory < 0 ? nullptr : memory + task.memory);
    });
    parallel_for(static_cast<int64_t>(merges.size()), threads_worth(static_cast<double>(floats)),
                 [&](int64_t i) {
                     const Merge& merge = merges[static_cast<size_t>(i)];
                     const int64_t queries = args.sequences[merge.sequence].seqlen_q;
                     kernel.merge(args, merge.sequence, merge.row / queries, merge.row % queries,
                                  memory + merge.memory, merge.stride, merge.parts,
                                  thread_scratch(scratch));
                 });
}

}  // namespace umfa::cpu
