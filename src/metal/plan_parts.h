// What every planner shares: how a Problem's tensors, options and numbers reach a kernel.
#pragma once

#include <vector>

#include "core/export.h"
#include "core/launch_plan.h"
#include "core/problem.h"
#include "metal/capabilities.h"
#include "shared/constants.h"
#include "shared/params.h"

namespace umfa::metal {

/// How a dtype is spelled in MSL, and in kernel names.
struct ElementType {
    const char* storage;  // of the tensors' elements
    const char* operand;  // of the fragments
    const char* name;
    int operand_bytes;
    int staged_bytes;  // of an element of a tile in threadgroup memory (shared/staged.h)
};
ElementType element_type(DType dtype, const Capabilities& gpu);
/// The dtype of the forward and decode kernels' arithmetic: that of all tensors of numbers, float32 if
/// theirs differ. Codes become numbers of this dtype.
UMFA_CORE_API DType arithmetic_dtype(const Problem& problem);
/// Element type of the forward and decode kernels.
ElementType element_type(const Problem& problem, const Capabilities& gpu);
/// For kernels without fragments, which are the same for every GPU.
ElementType stored_type(DType dtype);

/// The tensors that the problem reads, for a plan's table.
std::vector<PlanTensor> input_tensors(const Problem& problem);
/// The table of a forward pass.
std::vector<PlanTensor> tensors_of(const Problem& problem, const ForwardResults& results);

OperandStrides strides_of(const Operand& operand);
RotaryParams rotary_params(const Problem& problem);
DropoutParams dropout_params(const Problem& problem);
/// The size of pages, or where kernels shift, its exponent.
int32_t pages_param(const Problem& problem);
ForwardParams forward_params(const Problem& problem, const ForwardResults& results);

/// Whether every row is 16-byte aligned and a multiple of 16 bytes long.
bool rows_are_wide(const Operand& operand, int64_t channels);
/// Whether every row starts on a multiple of `bytes`, and its elements follow each other.
bool rows_are_aligned(const Operand& operand, int64_t bytes);
/// Whether the kernel may read K and V 16 bytes at a time, as far as they are numbers.
bool wide_loads(const Problem& problem);

/// Whether the head dims are exactly a kernel's.
bool has_dims(const Problem& problem, int d, int dv);

/// Whether the columns (n * columns, ... , n * columns + columns - 1) of the mask can be read together,
/// by loads of up to 16 bytes.
bool has_aligned_runs(const TensorView& mask, int columns);

/// Indices of the constants, in whose order constants_of has them.
namespace constant {
#define UMFA_ENUMERATOR(INDEX, TYPE, NAME) NAME = INDEX,
enum Index : uint16_t { UMFA_CONSTANTS(UMFA_ENUMERATOR) };
#undef UMFA_ENUMERATOR
}  // namespace constant

/// Value of a kind constant for a tensor of `dtype` in a float kernel.
int narrow_kind(DType dtype);

/// All constants of shared/constants.h: 0, and those of a problem.
std::vector<Constant> zero_constants();
std::vector<Constant> constants_of(const Problem& problem, const ForwardResults& results);

}  // namespace umfa::metal
