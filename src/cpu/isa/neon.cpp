// Kernels for arm64: NEON is always there.
#include <arm_neon.h>

#include "cpu/isa/kernels.h"

namespace umfa::cpu {
namespace {

constexpr int vector_lanes = 4;
#include "cpu/isa/simd.h"

struct Simd : SimdBase {
    static constexpr int mr = 12, nv = 2;  // 24 accumulators of 32 registers

    static vf load_f16(const uint16_t* p) {
        return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    static void store_f16(uint16_t* p, vf x) {
        vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
    }
};

#include "cpu/isa/forward_kernel.h"
// After what it builds on.
#include "cpu/isa/decode_kernel.h"

}  // namespace

constinit const Kernels neon_kernels{
    "neon",
    nullptr,
    Simd::nv * Simd::W,
    dtype_kernels<Simd, FloatUnits<Simd, F32>>,
    dtype_kernels<Simd, FloatUnits<Simd, F16>>,
    dtype_kernels<Simd, FloatUnits<Simd, BF16>>,
};

}  // namespace umfa::cpu
