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
    const int64_t heads = problem.batch * problem.nheads_kv;
    const int64_t row_floats = kernel.row_floats(args);
    const int64_t stride = rows * row_floats;  // of one part
    float* memory = parts > 1 ? call_scratch(heads * parts * stride) : nullptr;

    const double pairs = static_cast<double>(heads) * static_cast<double>(rows) *
                         static_cast<double>(args.seqlen_kv);
    const int threads =
        threads_worth(pairs * static_cast<double>(args.head_dim + args.head_dim_v));
    const int64_t scratch = kernel.scratch_floats(args);
    parallel_for(heads * parts, threads, [&](int64_t task) {
        const int64_t head = task / parts, part = task % parts;
        const int64_t end = std::min(args.seqlen_kv, (part + 1) * part_keys);
        kernel.run(args, head / problem.nheads_kv, head % problem.nheads_kv, part * part_keys, end,
                   thread_scratch(scratch), memory ? memory + task * stride : nullptr);
    });
    if (!memory) return;
    const double floats =
        static_cast<double>(heads * rows) * static_cast<double>(parts * row_floats);
    parallel_for(heads * rows, threads_worth(floats), [&](int64_t task) {
        const int64_t head = task / rows, row = task % rows;
        kernel.merge(args, head / problem.nheads_kv,
                     head % problem.nheads_kv * args.group + row / args.seqlen_q,
                     row % args.seqlen_q, memory + head * parts * stride + row * row_floats, stride,
                     parts, thread_scratch(scratch));
    });
}

}  // namespace umfa::cpu
