// Few queries over many keys: cuts the keys into parts that run on their own, and merges them.
#pragma once

#include "core/problem.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {

/// Whether `problem` is better served by the decode kernel than by panels of `lanes` queries.
bool is_decode(const Problem& problem, int lanes);

void run_decode(const Problem& problem, const ForwardArgs& args, const DecodeKernel& kernel);

}  // namespace umfa::cpu
