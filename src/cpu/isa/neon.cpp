// Kernels for arm64: NEON is always there.
#include <arm_neon.h>

#include "cpu/isa/kernels.h"

namespace umfa::cpu {
namespace {

constexpr int vector_lanes = 4;
#include "cpu/isa/simd.h"

#include "cpu/isa/neon_simd.h"

using Simd = Neon;

#include "cpu/isa/forward_kernel.h"
// After what it builds on.
#include "cpu/isa/decode_kernel.h"

}  // namespace

constinit const Kernels neon_kernels{
    "neon",
    nullptr,
    Simd::nv * Simd::W,
    dtype_kernels<Simd, FloatUnits<Simd, F32>>,
    dtype_kernels<Simd, FloatUnits<Simd, F16>>,
    dtype_kernels<Simd, FloatUnits<Simd, BF16>>,
};

}  // namespace umfa::cpu
