// Forward pass on the CPU: cuts a Problem into blocks of queries and hands them to the kernels.
#include <algorithm>
#include <string>

#include "core/backend.h"
#include "core/error.h"
#include "cpu/decode.h"
#include "cpu/isa/select.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

Rows rows_of(const Operand& operand) {
    return {operand.view.size() ? operand.view.address() : nullptr, operand.stride_batch,
            operand.stride_head, operand.stride_row, operand.stride_channel};
}

/// Query rows per task: a tile of K and V is packed once per block, so large blocks are cheaper
/// (D=64: 6 % from 128 to 256 rows), but every thread should get a few tasks. Results do not depend
/// on it.
int64_t block_q_of(const Problem& problem, int64_t lanes) {
    int64_t block = std::max<int64_t>(lanes, 256);
    const int64_t heads = problem.batch * problem.nheads_q;
    const int64_t wanted = int64_t{4} * num_threads();
    while (block > lanes && heads * ((problem.seqlen_q + block - 1) / block) < wanted) block /= 2;
    return std::max(lanes, std::min(block, (problem.seqlen_q + lanes - 1) / lanes * lanes));
}

const DtypeKernels& kernels_for(const Kernels& set, DType dtype) {
    const DtypeKernels& own = dtype == DType::f16    ? set.f16
                              : dtype == DType::bf16 ? set.bf16
                                                     : set.f32;
    return own.forward.run ? own : kernels_for(*set.base, dtype);
}

void run_forward(const Problem& problem) {
    const int64_t heads = problem.batch * problem.nheads_q;
    if (heads == 0 || problem.seqlen_q == 0) return;
    const Kernels& set = kernels();

    ForwardArgs args{};
    args.query = rows_of(problem.query);
    args.key = rows_of(problem.key);
    args.value = rows_of(problem.value);
    args.out = rows_of(*problem.out);
    if (problem.lse) args.lse = rows_of(*problem.lse);
    args.group = problem.nheads_q / problem.nheads_kv;
    args.seqlen_q = problem.seqlen_q;
    args.seqlen_kv = problem.seqlen_kv;
    args.head_dim = problem.head_dim;
    args.head_dim_v = problem.head_dim_v;
    args.visible = problem.visible;
    args.score_scale = static_cast<float>(problem.score_scale());
    args.score_scale_low = static_cast<float>(problem.score_scale() - args.score_scale);
    args.softcap = static_cast<float>(problem.softcap_log2());
    if (problem.alibi) {
        args.slopes = reinterpret_cast<const float*>(problem.alibi->view.address());
        args.slopes_stride_batch = problem.alibi->stride_batch;
        args.slopes_stride_head = problem.alibi->stride_head;
    }
    const DtypeKernels& own = kernels_for(set, problem.query.view.dtype);
    if (is_decode(problem, set.lanes)) return run_decode(problem, args, own.decode);

    args.block_q = block_q_of(problem, set.lanes);
    const int64_t scratch = own.forward.scratch_floats(args);
    const int64_t blocks = (problem.seqlen_q + args.block_q - 1) / args.block_q;
    const double pairs = static_cast<double>(heads) * static_cast<double>(problem.seqlen_q) *
                         static_cast<double>(problem.seqlen_kv);
    const int threads =
        threads_worth(pairs * static_cast<double>(problem.head_dim + problem.head_dim_v));
    parallel_for(heads * blocks, threads, [&](int64_t task) {
        const int64_t head = task / blocks;
        // Under a causal mask the last blocks see the most keys: they go first, so that no thread
        // starts a long one when the others are done.
        const int64_t block = problem.causal ? blocks - 1 - task % blocks : task % blocks;
        own.forward.run(args, head / problem.nheads_q, head % problem.nheads_q,
                        block * args.block_q, thread_scratch(scratch));
    });
}

constexpr uint32_t forward_features = bit(Feature::causal) | bit(Feature::window) |
                                      bit(Feature::softcap) | bit(Feature::alibi) |
                                      bit(Feature::lse) | bit(Feature::gqa);

Verdict available() {
    kernels();      // throws about UMFA_CPU_ISA
    num_threads();  // throws about UMFA_NUM_THREADS
    return {};
}

}  // namespace

const Backend backend{
    "cpu",   forward_features, available,  [](Device device) { return device == Device::cpu; },
    nullptr, nullptr,          run_forward};

}  // namespace umfa::cpu
