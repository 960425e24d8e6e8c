// Backward pass of attention, FlashAttention-2's (Dao 2023), with sums in float32. With
// P = exp(score - lse) and delta = rowsum(dout * out) - dlse,
//   dV += P^T dO,  dS = P * (dO V^T - delta),  dQ += dS K,  dK += dS^T Q.
// backward_run() at the end is the algorithm.
//
// As in forward_kernel.h, the scores are transposed: queries lie along the lanes. S^T = K Q^T and
// dP^T = V dO^T broadcast K and V; the sums broadcast P^T and dS^T, and have channels along the lanes.
// A block of keys is packed once for all queries of the task, a tile of queries once for each block.
//
// U is what the products multiply. Of bfloat16 units, P and dS are rounded to bfloat16 for the three sums,
// as in PyTorch's kernels; P * (dP - delta) is computed from floats. Nothing that is tiny is left out (see
// Bf16Units): a gradient of 2**-118 has the error that it has in PyTorch.
//
// Tiles of queries and blocks of keys begin at multiples of their sizes, which depend on the head dims
// alone. So a gradient's terms are added in the same order however a pass is cut into tasks.
#pragma once

#include "cpu/isa/backward_work.h"

namespace umfa::cpu {
namespace {

/// A tile of queries of one head with a block of keys.
template <class S, class U>
inline void backward_tile(BackwardWork<S, U>& work, int64_t row, int64_t block) {
    constexpr int64_t panels = BackwardWork<S, U>::panels;
    const BackwardTask& task = work.task;
    const bool wants_gradients = work.wants_gradients();
    work.load_keys(block);
    work.load_queries(row);
    for (int64_t tile = block; tile < block + work.block_keys; tile += block_kv) {
        if (!work.find_groups(tile)) continue;
        for (int64_t p = 0; p < panels; ++p) {
            if (row + p * work.N >= work.query_end) continue;
            work.probability_tile(p);
            if (!wants_gradients) continue;
            work.gradient_tile(p);
            if (task.dquery) work.add_to_queries(p);
        }
        if (task.dkey) work.add_to_keys();
    }
}

template <class S, class U>
void backward_run(const BackwardArgs& args, const BackwardTask& task, float* scratch) {
    BackwardWork<S, U> work(args, task, scratch);
    const BackwardScratch<S, U>& at = work.at;
    constexpr int64_t query_tile = queries_of_tile<U>;
    const bool shares = task.shared != nullptr;
    if (task.dquery && !shares)
        work.clear(work.dquery, task.head_count * at.query_count * at.key_pitch);
    const int64_t last_key = shares ? task.key_end : at.longest(args, task, true);
    if (task.sums_mask && !shares) work.clear(scratch + at.dmask, at.mask_floats(task, last_key));
    for (int64_t block = task.key_begin; block < last_key; block += at.block) {
        if (task.dkey) work.clear(scratch + at.dkey, at.block * at.key_pitch);
        if (task.dkey) work.clear(scratch + at.dvalue, at.block * at.value_pitch);
        int64_t step = 0;
        for (int64_t i = 0; i < task.head_count; ++i) {
            work.start_head(i);
            const int64_t last_query = shares ? task.query_end : work.query_end;
            for (int64_t row = task.query_begin; row < last_query; row += query_tile, ++step) {
                if (shares) work.begin_turn(row, step);
                if (work.touched(row, block)) backward_tile(work, row, block);
                if (shares) work.end_turn(row, step);
            }
            if (task.dslopes && block < work.key_end) {
                float sum = 0;
                for (int n = 0; n < S::W; ++n) sum += work.slope_sum[n];
                task.dslopes[i * task.dslopes_pitch + block / at.block] = sum;
            }
        }
        if (task.dkey && work.packed_block != block) {  // no query sees it
            work.start_head(0);
            work.block = block;
            work.block_keys = smaller(at.block, work.key_end - block);
        }
        if (task.dkey) work.store_keys();
    }
    if (task.dquery && !shares)
        for (int64_t i = 0; i < task.head_count; ++i) {
            work.start_head(i);
            work.store_queries(task.query_begin, work.query_end);
        }
    if (task.sums_mask && !shares) work.store_mask();
}

template <class S, class U>
int64_t backward_scratch_floats(const BackwardArgs& args, const BackwardTask& task) {
    return BackwardScratch<S, U>(args, task).size;
}

template <class S, class U>
BackwardSizes backward_sizes(const BackwardArgs& args) {
    const BackwardScratch<S, U> sizes(args);
    return {sizes.block, queries_of_tile<U>, sizes.key_pitch};
}

}  // namespace
}  // namespace umfa::cpu
