// NEON with BF16 (Armv8.6, Apple M2): bfloat16 products at twice the rate of float ones. The rest
// is neon.cpp's.
//
// Unless FPCR.EBF is set, BFDOT takes subnormal numbers as 0: see Bf16Units.
#define UMFA_VECTOR_LANES 4
#include "cpu/isa/dtype_kernels.h"
#include "cpu/isa/neon_simd.h"

namespace umfa::cpu {
namespace {

struct Simd : Neon {
    struct Bf16Lanes {
        static vf load(const float* p) { return Neon::load(p); }
        // As inline assembly: from vbfdotq_laneq_f32 clang 22 makes a broadcast and a plain BFDOT
        // where the operand comes from memory, 42 instructions in the loop instead of 30.
        template <int Lane>
        static vf fma(vf acc, vf a, vf b) {
            __asm__("bfdot %0.4s, %1.8h, %2.2h[%3]" : "+w"(acc) : "w"(b), "w"(a), "i"(Lane));
            return acc;
        }
    };
    template <class U, int MR, int NV>
    static inline __attribute__((always_inline)) void multiply_add(vf (&acc)[MR][NV],
                                                                   const float* a,
                                                                   const vf (&b)[NV]) {
        by_lane<Bf16Lanes>(acc, a, b);
    }

    static vf fma_bf16(vf acc, vf a, vf b) {
        return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)b, (bfloat16x8_t)a);
    }
    static vf without_tiny_bf16(vf x, uint16_t tiny, bool& found) {
        const uint16x8_t magnitude = vandq_u16((uint16x8_t)x, vdupq_n_u16(0x7fff));
        const uint16x8_t small = vcltq_u16(magnitude, vdupq_n_u16(tiny));
        found |= vmaxvq_u16(vandq_u16(magnitude, small)) != 0;
        return (vf)vbicq_u16((uint16x8_t)x, small);
    }
    /// Lane by lane: low in the lower half, high in the upper.
    static vf pack_bf16(vf low, vf high) { return (vf)vzip1q_u16(rounded(low), rounded(high)); }
    static void store_bf16(uint16_t* p, vf x) { vst1_u16(p, vget_low_u16(rounded(x))); }

private:
    static uint16x8_t rounded(vf x) { return (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)x); }
};

}  // namespace

constinit const Kernels neon_bf16_kernels{
    "neon_bf16",
    &neon_kernels,
    Simd::nv * Simd::W,
    {},
    {},
    dtype_kernels<Simd, Bf16Units<Simd>>,
    {},
    {},
    {},
    {},
    {},
};

}  // namespace umfa::cpu
