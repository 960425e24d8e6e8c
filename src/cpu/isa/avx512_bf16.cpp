// AVX-512 with BF16: bfloat16 products at twice the rate of float ones. The rest is avx512.cpp's.
#define UMFA_VECTOR_LANES 16
#include "cpu/isa/avx512_bf16_simd.h"
#include "cpu/isa/dtype_kernels.h"

namespace umfa::cpu {
namespace {

using Simd = Avx512Bf16;

}  // namespace

constinit const Kernels avx512_bf16_kernels{
    "avx512_bf16",
    &avx512_kernels,
    Simd::nv * Simd::W,
    {},
    {},
    dtype_kernels<Simd, Bf16Units<Simd>>,
    {},
    {},
    backward_kernel<Simd, Bf16Units<Simd>>,
    {},
    {{}, {}, int8_score_kernel<Simd, Bf16Units<Simd>, Int8Units<Simd, true>>, {}},
};

}  // namespace umfa::cpu
