// What a Problem's parts are for the kernels.
#pragma once

#include <vector>

#include "core/problem.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {

float float_at(const char* data, int64_t element, DType dtype);
ElementType element_of(DType dtype);
Rows rows_of(const Operand& operand);
Codes codes_of(const QuantOperand& operand);
Mask mask_of(const DenseMask& mask);
Rotary rotary_of(const umfa::Rotary& rotary);
/// One for each index of the batch. They point into the problem's pages.
std::vector<Sequence> sequences_of(const Problem& problem);

}  // namespace umfa::cpu
