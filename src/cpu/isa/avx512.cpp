// Kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#include <immintrin.h>

#include "cpu/isa/kernels.h"

namespace umfa::cpu {
namespace {

constexpr int vector_lanes = 16;
#include "cpu/isa/simd.h"

#include "cpu/isa/avx512_simd.h"

using Simd = Avx512;

#include "cpu/isa/forward_kernel.h"
// After what it builds on.
#include "cpu/isa/decode_kernel.h"

}  // namespace

constinit const Kernels avx512_kernels{
    "avx512",
    nullptr,
    Simd::nv * Simd::W,
    dtype_kernels<Simd, FloatUnits<Simd, F32>>,
    dtype_kernels<Simd, FloatUnits<Simd, F16>>,
    dtype_kernels<Simd, FloatUnits<Simd, BF16>>,
};

}  // namespace umfa::cpu
