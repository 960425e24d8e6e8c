// Quantising a tensor, and the way back.
#pragma once

#include "core/quantize.h"

namespace umfa::cpu {

/// Throws `Error` if a block is not finite and the problem does not allow it.
void run_quantize(const QuantizeProblem& problem, const QuantizeResults& results);
void run_dequantize(const DequantizeProblem& problem, const DequantizeResults& results);

}  // namespace umfa::cpu
