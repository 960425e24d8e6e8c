// Vectors of AVX-512 with BF16.
#pragma once

#include "cpu/isa/avx512_simd.h"

namespace umfa::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
    static vf fma_bf16(vf acc, vf a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    }
    static vf without_tiny_bf16(vf x, uint16_t tiny, bool& found) {
        const __m512i magnitude = _mm512_and_si512((__m512i)x, _mm512_set1_epi16(0x7fff));
        const __mmask32 small =
            _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<short>(tiny)));
        found |= _mm512_mask_test_epi16_mask(small, magnitude, magnitude) != 0;
        return (vf)_mm512_mask_mov_epi16((__m512i)x, small, _mm512_setzero_si512());
    }
    /// The same for elements that are tiny or not finite.
    static vf without_extremes_bf16(vf x, uint16_t tiny, bool& found) {
        const __m512i magnitude = _mm512_and_si512((__m512i)x, _mm512_set1_epi16(0x7fff));
        const __mmask32 extreme =
            _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<short>(tiny))) |
            _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80));
        found |= _mm512_mask_test_epi16_mask(extreme, magnitude, magnitude) != 0;
        return (vf)_mm512_mask_mov_epi16((__m512i)x, extreme, _mm512_setzero_si512());
    }
    /// Lane by lane: low in the lower half, high in the upper.
    static vf pack_bf16(vf low, vf high) {
        typedef uint16_t v32h __attribute__((vector_size(64)));
        const v32h both = (v32h)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        const v32h order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (vf)_mm512_permutexvar_epi16((__m512i)order, (__m512i)both);
    }
};

}  // namespace
}  // namespace umfa::cpu
