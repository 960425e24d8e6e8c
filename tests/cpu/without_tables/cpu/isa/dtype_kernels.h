// Replaces src/cpu/isa/dtype_kernels.h for kernel_math.cpp: the same headers, but empty tables.
// The real tables instantiate all kernels, which takes most of the compile time.
#pragma once

#include "cpu/isa/append.h"
#include "cpu/isa/combine_kernel.h"
#include "cpu/isa/decode_kernel.h"
#include "cpu/isa/forward_kernel.h"
#include "cpu/isa/int8_values.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {
namespace {

template <class S, class U>
constexpr DtypeKernels dtype_kernels{};
template <class S>
constexpr DtypeKernels mixed_kernels{};
template <class S, class U = AnyUnits<S>>
constexpr BackwardKernel backward_kernel{};
template <class S>
constexpr QuantKernel quant_kernel{};
template <class S, class U, class Q>
constexpr Int8Kernel int8_score_kernel{};
template <class S, class U, class Q>
constexpr Int8Kernel int8_kernel{};
template <class S, class Q>
constexpr Int8Kernels int8_kernels{};

}  // namespace
}  // namespace umfa::cpu
