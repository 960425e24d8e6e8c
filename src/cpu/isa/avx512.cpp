// Kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#define UMFA_VECTOR_LANES 16
#include "cpu/isa/avx512_simd.h"
#include "cpu/isa/dtype_kernels.h"

namespace umfa::cpu {
namespace {

using Simd = Avx512;

}  // namespace

constinit const Kernels avx512_kernels{
    "avx512",
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
