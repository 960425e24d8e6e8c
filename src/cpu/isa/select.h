// Which instruction set's kernels run: the best one this CPU has, or the one UMFA_CPU_ISA names.
#pragma once

#include <optional>

#include "core/dtype.h"
#include "core/instruments.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {

/// Kernels in use. Throws `Error` when UMFA_CPU_ISA names a set that cannot run here.
const Kernels& kernels();

/// Those of the set for an element type, or of a set that it builds on.
const DtypeKernels& kernels_for(const Kernels& set, DType dtype);
/// The set's kernels for tensors of different types, or those of a set that it builds on.
const DtypeKernels& mixed_kernels(const Kernels& set);
/// The kernel for a backward pass; `bf16`: query, key, value and the gradient of out are bfloat16.
const BackwardKernel& backward_kernel(const Kernels& set, bool bf16);
const QuantKernel& quant_kernel(const Kernels& set);
/// nullopt: of tensors of different dtypes. `values`: that has weights and values in int8.
const Int8Kernel& int8_kernel(const Kernels& set, std::optional<DType> dtype, bool values);

}  // namespace umfa::cpu
