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

}  // namespace

constinit const Kernels neon_kernels{
    "neon",
    nullptr,
    Simd::nv * Simd::W,
    forward_kernel<Simd, FloatUnits<Simd, F32>>,
    forward_kernel<Simd, FloatUnits<Simd, F16>>,
    forward_kernel<Simd, FloatUnits<Simd, BF16>>,
};

}  // namespace umfa::cpu
