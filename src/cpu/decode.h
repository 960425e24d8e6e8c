// Decode: few queries over many keys. The keys are cut into parts that run on their own and are
// merged.
#pragma once

#include <vector>

#include "core/problem.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {

/// Whether a sequence is better served by the decode kernel than by panels of `lanes` queries.
inline bool is_decode(const Sequence& sequence, int lanes) {
    // A panel computes all its lanes and packs K and V first: with up to half of them in use, going
    // over K and V in place costs less, and only it splits the keys between threads.
    return sequence.seqlen_q <= lanes / 2;
}

/// Channels that one score is the sum over.
inline int64_t score_channels(const Problem& problem) {
    return problem.head_dim + (problem.qv ? problem.head_dim_v : 0);
}

/// Runs the sequences at `batch_indices`.
void run_decode(const Problem& problem, const ForwardArgs& args, const DecodeKernel& kernel,
                const std::vector<int64_t>& batch_indices);

}  // namespace umfa::cpu
