#include "cpu/decode.h"

#include <algorithm>

#include "core/dtype.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

/// Keys of a part: up to 32 parts of at least 512 keys. The same on every machine, so that bits do
/// not depend on the number of threads.
int64_t keys_per_part(int64_t seqlen_kv) {
    constexpr int64_t tile = 64;  // parts begin at multiples of the kernels' tile
    return std::max<int64_t>(512, (seqlen_kv + 32 * tile - 1) / (32 * tile) * tile);
}

}  // namespace

bool is_decode(const Problem& problem, int lanes) {
    // A panel computes all its lanes and packs K and V first: with up to half of them in use, going
    // over K and V in place costs less, and only it splits the keys between threads.
    return problem.seqlen_q <= lanes / 2;
}

void run_decode(const Problem& problem, const ForwardArgs& args, const DecodeKernel& kernel) {
    const int64_t rows = args.group * args.seqlen_q;
    const int64_t part_keys = keys_per_part(args.seqlen_kv);
    const int64_t parts = std::max<int64_t>(1, (args.seqlen_kv + part_keys - 1) / part_keys);
    const int64_t row_floats = kernel.row_floats(args);
    const int64_t head_floats = rows * row_floats, part_floats = problem.nheads_kv * head_floats;
    float* memory = parts > 1 ? call_scratch(problem.batch * parts * part_floats) : nullptr;

    const double pairs = static_cast<double>(problem.batch * problem.nheads_kv) *
                         static_cast<double>(rows) * static_cast<double>(args.seqlen_kv);
    const int threads = threads_worth(pairs * static_cast<double>(args.head_dim + args.head_dim_v));
    // Heads go together as far as that leaves every thread a few tasks.
    int64_t together = problem.nheads_kv;
    const auto groups = [&] { return (problem.nheads_kv + together - 1) / together; };
    while (together > 1 && problem.batch * parts * groups() < int64_t{4} * threads) together /= 2;
    const int64_t per_batch = parts * groups(), scratch = kernel.scratch_floats(args, together);
    parallel_for(problem.batch * per_batch, threads, [&](int64_t task) {
        const int64_t batch = task / per_batch, part = task % per_batch / groups();
        const int64_t head = task % groups() * together;
        kernel.run(
            args, batch, head, std::min(problem.nheads_kv, head + together), part * part_keys,
            std::min(args.seqlen_kv, (part + 1) * part_keys), thread_scratch(scratch),
            memory ? memory + (batch * parts + part) * part_floats + head * head_floats : nullptr);
    });
    if (!memory) return;
    const int64_t all_rows = problem.batch * problem.nheads_kv * rows;
    const double floats = static_cast<double>(all_rows) * static_cast<double>(parts * row_floats);
    parallel_for(all_rows, threads_worth(floats), [&](int64_t task) {
        const int64_t batch = task / (problem.nheads_kv * rows);
        const int64_t row =
            task % (problem.nheads_kv * rows);  // (key head, head of its group, query)
        kernel.merge(args, batch, row / args.seqlen_q, row % args.seqlen_q,
                     memory + batch * parts * part_floats + row * row_floats, part_floats, parts,
                     thread_scratch(scratch));
    });
}

}  // namespace umfa::cpu
