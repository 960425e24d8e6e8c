// Vectors of NEON, which every arm64 CPU has.
//
// float16 is converted to float32 on the way into a panel. Sums in float16 (FMLA at twice the rate)
// are not accurate enough: with 128 channels of normal numbers they put scores off by up to 0.011
// after scaling, the output by 1.5e-3 and its log-sum-exp by 5e-4, where 1e-3 and 2e-5 are
// promised. FMLAL sums in float32, but at the rate of float32's FMLA: all it would save is that
// conversion, one instruction for each 128 FMLAs, at the price of probabilities rounded to float16.
#pragma once

#include <arm_neon.h>

#include "cpu/isa/simd.h"

namespace umfa::cpu {
namespace {

struct Neon : SimdBase {
    static constexpr int mr = 12, nv = 2;  // 24 accumulators of 32 registers
    static constexpr bool native_exponent = true;

    /// By lane: 5 loads for 24 FMAs. A broadcasting load (ld1r) per a[m] would make it 14, and
    /// takes a slot of the vector units on Arm's own cores. `Lanes` has the instruction.
    template <class Lanes, int M = 0, int MR, int NV>
    static inline __attribute__((always_inline)) void by_lane(vf (&acc)[MR][NV], const float* a,
                                                              const vf (&b)[NV]) {
        const auto four = Lanes::load(a + M);
        for (int n = 0; n < NV; ++n) {
            acc[M][n] = Lanes::template fma<0>(acc[M][n], four, b[n]);
            acc[M + 1][n] = Lanes::template fma<1>(acc[M + 1][n], four, b[n]);
            acc[M + 2][n] = Lanes::template fma<2>(acc[M + 2][n], four, b[n]);
            acc[M + 3][n] = Lanes::template fma<3>(acc[M + 3][n], four, b[n]);
        }
        if constexpr (M + W < MR) by_lane<Lanes, M + W>(acc, a, b);
    }

    struct FloatLanes {
        static vf load(const float* p) { return Neon::load(p); }
        // Not the intrinsic: around vfmaq_laneq_f32 GCC 12 stores the accumulators in every step.
        template <int Lane>
        static vf fma(vf acc, vf a, vf b) {
            return acc + a[Lane] * b;
        }
    };
    template <class U, int MR, int NV>
    static inline __attribute__((always_inline)) void multiply_add(vf (&acc)[MR][NV],
                                                                   const float* a,
                                                                   const vf (&b)[NV]) {
        by_lane<FloatLanes>(acc, a, b);
    }

    using SimdBase::product;
    static vq product(vq x, uint32_t factor) {
        return (vq)vmull_n_u32(vmovn_u64((uint64x2_t)x), factor);
    }
    static bool any(vi x) { return vmaxvq_u32((uint32x4_t)x) != 0; }
    /// NaN where either is NaN, unlike simd.h's. Results are the same: one NaN score makes its
    /// whole row NaN.
    static vf max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
    static vf min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
    static vf fma(vf acc, vf a, vf b) {
        return (vf)vfmaq_f32((float32x4_t)acc, (float32x4_t)a, (float32x4_t)b);
    }
    static vf round(vf x) { return (vf)vrndnq_f32((float32x4_t)x); }
    /// p * 2**whole; 0 where x < -126.
    static vf scale_unless_tiny(vf p, vf whole, vf x) {
        const vf y = (vf)((vu)p + ((vu)vcvtq_s32_f32((float32x4_t)whole) << 23));
        return x < -126.f ? vf{} : y;
    }

    static vf fused(vf a, vf b, vf c) { return fma(c, a, b); }
    struct Table {
        uint8x16x4_t bytes;
        explicit Table(const float* p) {
            for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(p + 4 * i));
        }
    };
    static vf lookup(const Table& table, vu code) {
        const vu at = (code & 15u) * 0x04040404u + 0x03020100u;  // of the four bytes of each lane
        return (vf)vqtbl4q_u8(table.bytes, (uint8x16_t)at);
    }

    static vf load_f16(const uint16_t* p) {
        return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    static void store_f16(uint16_t* p, vf x) {
        vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
    }
};

}  // namespace
}  // namespace umfa::cpu
