// Kernels for arm64: NEON is always there.
#define UMFA_VECTOR_LANES 4
#include "cpu/isa/dtype_kernels.h"
#include "cpu/isa/neon_simd.h"

namespace umfa::cpu {
namespace {

using Simd = Neon;

}  // namespace

constinit const Kernels neon_kernels{
    "neon",
    nullptr,
    Simd::nv * Simd::W,
    dtype_kernels<Simd, FloatUnits<Simd, F32>>,
    dtype_kernels<Simd, FloatUnits<Simd, F16>>,
    dtype_kernels<Simd, FloatUnits<Simd, BF16>>,
    mixed_kernels<Simd>,
    backward_kernel<Simd>,
    {},
    quant_kernel<Simd>,
    int8_kernels<Simd, FloatIntegers<Simd>>,
};

}  // namespace umfa::cpu
