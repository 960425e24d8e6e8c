// Vectors of AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#ifndef UMFA_VECTOR_LANES
#define UMFA_VECTOR_LANES 16
#endif
#include "cpu/isa/simd.h"

namespace umfa::cpu {
namespace {

struct Avx512 : SimdBase {
    static constexpr int mr = 12, nv = 2;  // 24 accumulators of 32 registers
    static constexpr bool native_exponent = true;

    static vf load_part(const float* src, int64_t n) {
        return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), src);
    }
    static void store_part(float* dst, vf x, int64_t n) {
        _mm512_mask_storeu_ps(dst, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
    }
    // One whole store each: a load that met two smaller ones would wait for both.
    static void fill(const float* src, int64_t n, float* dst, int64_t) {
        _mm512_storeu_ps(dst, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), src));
    }
    static void fill(const uint16_t* src, int64_t n, uint16_t* dst, int64_t size) {
        const __mmask32 part = n < 32 ? (1u << n) - 1 : 0xffffffffu;
        if (size == 32)
            _mm512_storeu_si512(dst, _mm512_maskz_loadu_epi16(part, src));
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                                _mm256_maskz_loadu_epi16(static_cast<__mmask16>(part), src));
    }
    static void copy(const float* src, int64_t n, float* dst) {
        for (; n > 0; n -= 16, src += 16, dst += 16) {
            const __mmask16 part = static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xffffu);
            _mm512_mask_storeu_ps(dst, part, _mm512_maskz_loadu_ps(part, src));
        }
    }
    static void copy(const uint16_t* src, int64_t n, uint16_t* dst) {
        for (; n > 0; n -= 32, src += 32, dst += 32) {
            const __mmask32 part = n < 32 ? (1u << n) - 1 : 0xffffffffu;
            _mm512_mask_storeu_epi16(dst, part, _mm512_maskz_loadu_epi16(part, src));
        }
    }
    using SimdBase::product;
    static vq product(vq x, uint32_t factor) {
        return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
    }
    static bool any(vi x) { return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0; }
    static vf fma(vf acc, vf a, vf b) {
        return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
    }
    static vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
    static vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
    static vf round(vf x) {
        return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    /// p * 2**whole; 0 where x < -126.
    static vf scale_unless_tiny(vf p, vf whole, vf x) {
        const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
        return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
    }

    template <int Distance>
    static vf swap(vf x) {
        if constexpr (Distance == 8)
            return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
        else if constexpr (Distance == 4)
            return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
        else
            return (vf)_mm512_permute_ps((__m512)x, Distance == 2 ? 0x4e : 0xb1);
    }
    /// By two blends and a shuffle of one register: GCC 12 makes two shuffles of two registers.
    template <int Distance>
    static vf merge(vf a, vf b) {
        constexpr __mmask16 of_b = Distance == 8   ? 0xff00
                                   : Distance == 4 ? 0xf0f0
                                   : Distance == 2 ? 0xcccc
                                                   : 0xaaaa;
        return (vf)_mm512_mask_blend_ps(of_b, (__m512)a, (__m512)b) +
               swap<Distance>((vf)_mm512_mask_blend_ps(of_b, (__m512)b, (__m512)a));
    }
    static vf fused(vf a, vf b, vf c) { return fma(c, a, b); }
    static vi load_i8(const uint8_t* p) {
        return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static vu load_u8(const uint8_t* p) {
        return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static vu load_halves(const uint8_t* p) {
        const __m128i first = _mm_loadu_si32(p), second = _mm_loadu_si32(p + 4);
        const __m512i words =
            _mm512_mask_broadcastd_epi32(_mm512_broadcastd_epi32(first), 0xff00, second);
        const vu shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
        return (vu)words >> shift;
    }
    struct Table {
        __m512 all;
        explicit Table(const float* p) : all(_mm512_loadu_ps(p)) {}
    };
    static vf lookup(const Table& table, vu code) {
        return (vf)_mm512_permutexvar_ps((__m512i)code, table.all);
    }

#if defined(__AVX512VNNI__)
    /// Each lane plus the sum of four products: of bytes of a, which have no sign, and of b.
    static vf dot_i8(vf acc, vf a, vf b) {
        return (vf)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
    }
#endif

    static vu load_u16(const uint16_t* p) {
        return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static vf load_bf16(const uint16_t* p) { return (vf)(load_u16(p) << 16); }
    static vf load_f16(const uint16_t* p) {
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_f16(uint16_t* p, vf x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace
}  // namespace umfa::cpu
