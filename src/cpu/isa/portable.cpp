// Kernels for any CPU: 4-wide vectors, which every compiler lowers to what its baseline has.
#include "cpu/isa/kernels.h"

namespace umfa::cpu {
namespace {

constexpr int vector_lanes = 4;
#include "cpu/isa/simd.h"

struct Simd : SimdBase {
    static constexpr int mr = 4, nv = 2;  // 8 accumulators of the 16 SSE2 registers
};

#include "cpu/isa/forward_kernel.h"
// After what it builds on.
#include "cpu/isa/decode_kernel.h"

}  // namespace

constinit const Kernels portable_kernels{
    "portable",
    nullptr,
    Simd::nv * Simd::W,
    dtype_kernels<Simd, FloatUnits<Simd, F32>>,
    dtype_kernels<Simd, FloatUnits<Simd, F16>>,
    dtype_kernels<Simd, FloatUnits<Simd, BF16>>,
};

}  // namespace umfa::cpu
