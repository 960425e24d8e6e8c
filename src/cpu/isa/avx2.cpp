// Kernels for x86-64 with AVX2, FMA and F16C.
#define UMFA_VECTOR_LANES 8
#include <immintrin.h>

#include "cpu/isa/dtype_kernels.h"

namespace umfa::cpu {
namespace {

struct Simd : SimdBase {
    static constexpr int mr = 6, nv = 2;  // 12 accumulators of 16 registers

    using SimdBase::product;
    static vq product(vq x, uint32_t factor) {
        return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
    }
    static bool any(vi x) { return !_mm256_testz_si256((__m256i)x, (__m256i)x); }
    static vf fma(vf acc, vf a, vf b) {
        return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
    }
    static vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }

    static vf fused(vf a, vf b, vf c) { return fma(c, a, b); }
    static vi load_i8(const uint8_t* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
    static vu load_u8(const uint8_t* p) { return (vu)_mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
    struct Table {
        __m256 low, high;
        explicit Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
    };
    static vf lookup(const Table& table, vu code) {
        const __m256i at = (__m256i)code;  // its bit 3 becomes the sign, by which blendv chooses
        return (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, at),
                                    _mm256_permutevar8x32_ps(table.high, at), (__m256)(code << 28));
    }

    static vf load_f16(const uint16_t* p) {
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_f16(uint16_t* p, vf x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace

constinit const Kernels avx2_kernels{
    "avx2",
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
