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

}  // namespace

constinit const Kernels avx512_kernels{
    "avx512",
    nullptr,
    Simd::nv * Simd::W,
    forward_kernel<Simd, FloatUnits<Simd, F32>>,
    forward_kernel<Simd, FloatUnits<Simd, F16>>,
    forward_kernel<Simd, FloatUnits<Simd, BF16>>,
};

}  // namespace umfa::cpu
