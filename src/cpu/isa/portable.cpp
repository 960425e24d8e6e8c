// Kernels for any CPU: 4-wide vectors, which every compiler lowers to what its baseline has.
#define UMFA_VECTOR_LANES 4
#include "cpu/isa/dtype_kernels.h"

namespace umfa::cpu {
namespace {

struct Simd : SimdBase {
    static constexpr int mr = 4, nv = 2;  // 8 accumulators of the 16 SSE2 registers
};

}  // namespace

constinit const Kernels portable_kernels{
    "portable",
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
