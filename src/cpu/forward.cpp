// Forward pass on the CPU: cuts a Problem into blocks of queries and hands them to the kernels.
#include <algorithm>
#include <string>

#include "core/backend.h"
#include "core/error.h"
#include "cpu/isa/select.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

Rows rows_of(const Operand& operand) {
    return {operand.view.size() ? operand.view.address() : nullptr, operand.stride_batch,
            operand.stride_head, operand.stride_row, operand.stride_channel};
}

/// Query rows per task: K and V are converted once per block, so large blocks are cheaper, but
/// every thread should get a few tasks. Results do not depend on it.
int64_t block_q_of(const Problem& problem, int64_t lanes) {
    constexpr int64_t largest = 128;
    int64_t block = std::max(lanes, largest);
    const int64_t heads = problem.batch * problem.nheads_q;
    const int64_t wanted = int64_t{4} * num_threads();
    while (block > lanes && heads * ((problem.seqlen_q + block - 1) / block) < wanted) block /= 2;
    return std::max(lanes, std::min(block, (problem.seqlen_q + lanes - 1) / lanes * lanes));
}

const ForwardKernel& kernel_of(const Kernels& set, DType dtype) {
    const ForwardKernel& kernel = dtype == DType::f16    ? set.forward_f16
                                  : dtype == DType::bf16 ? set.forward_bf16
                                                         : set.forward_f32;
    return kernel.run ? kernel : kernel_of(*set.base, dtype);
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
    args.block_q = block_q_of(problem, set.lanes);

    const ForwardKernel& kernel = kernel_of(set, problem.query.view.dtype);
    const int64_t scratch = kernel.scratch_floats(args);
    const int64_t blocks = (problem.seqlen_q + args.block_q - 1) / args.block_q;
    parallel_for(heads * blocks, [&](int64_t task) {
        const int64_t head = task / blocks;
        // Under a causal mask the last blocks see the most keys: they go first, so that no thread
        // starts a long one when the others are done.
        const int64_t block = problem.causal ? blocks - 1 - task % blocks : task % blocks;
        kernel.run(args, head / problem.nheads_q, head % problem.nheads_q, block * args.block_q,
                   thread_scratch(scratch));
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
