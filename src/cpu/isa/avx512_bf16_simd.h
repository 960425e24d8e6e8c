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
    /// x with elements made 0 that are smaller than `tiny`, or not finite.
    static vf without_extremes_bf16(vf x, uint16_t tiny) {
        const __m512i magnitude = _mm512_and_si512((__m512i)x, _mm512_set1_epi16(0x7fff));
        const __mmask32 keep =
            _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<short>(tiny))) &
            _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x7f80));
        return (vf)_mm512_maskz_mov_epi16(keep, (__m512i)x);
    }
    /// Whether there are any but zeros.
    struct ExtremesBf16 {
        __m512i highest = _mm512_setzero_si512(), lowest = _mm512_set1_epi16(-1);
        void add(vf x) {
            const __m512i magnitude = _mm512_and_si512((__m512i)x, _mm512_set1_epi16(0x7fff));
            highest = _mm512_max_epu16(highest, magnitude);
            // Unsigned: 0 becomes the largest.
            lowest = _mm512_min_epu16(lowest, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
        }
        bool finite() const {
            return _mm512_cmpge_epu16_mask(highest, _mm512_set1_epi16(0x7f80)) == 0;
        }
        bool found(uint16_t tiny) const {
            const __m512i least = _mm512_set1_epi16(static_cast<short>(tiny - 1));
            return !finite() || _mm512_cmplt_epu16_mask(lowest, least) != 0;
        }
    };
    /// The lanes of first, then those of second.
    static vf narrow_bf16(vf first, vf second) {
        return (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
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
