// Kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#include <immintrin.h>

#include "cpu/isa/kernels.h"

namespace umfa::cpu {
namespace {

constexpr int vector_lanes = 16;
#include "cpu/isa/simd.h"

struct Simd : SimdBase {
    static constexpr int mr = 12, nv = 2;  // 24 accumulators of 32 registers

    static vf load_f16(const uint16_t* p) {
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_f16(uint16_t* p, vf x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
    }
};

#include "cpu/isa/forward_kernel.h"

}  // namespace

constinit const Kernels avx512_kernels = kernels_of<Simd>("avx512");

}  // namespace umfa::cpu
