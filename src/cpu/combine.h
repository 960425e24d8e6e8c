// Merging the results of attention over parts of the keys.
#pragma once

#include "core/combine.h"

namespace umfa::cpu {

void run_combine(const CombineProblem& problem, const CombineResults& results);

}  // namespace umfa::cpu
