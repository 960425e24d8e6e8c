// Vector functions of the kernels: exp2 and tanh.
#pragma once

#include "core/constants.h"
#include "cpu/isa/simd.h"

namespace umfa::cpu {
namespace {

constexpr float log2_e = static_cast<float>(umfa::log2_e);

template <class S>
struct Lanes {
    using vf = typename S::vf;
    using vu = typename S::vu;

    /// 2**x; 0 below 2**-126, NaN stays NaN. Within 1.2 ulp over [-126, 127] (1.0 with FMA).
    /// Subnormal results are 0: on some CPUs each costs more than a hundred cycles.
    static vf exp2(vf x) {
        if constexpr (S::native_exponent) {
            const vf whole = S::round(x);
            // Below -126 the result is 0, also for -inf, where the polynomial is NaN.
            return S::scale_unless_tiny(polynomial(x - whole), whole, x);
        } else {
            constexpr float magic = 12582912.f;  // 1.5 * 2**23: adding it rounds to an integer
            const vf clamped = x < -127.f ? S::splat(-127.f) : x;
            const vf shifted = clamped + magic;
            const vf p = polynomial(clamped - (shifted - magic));
            const vu exponent = (vu)shifted - 0x4b400000u;  // the bits of magic
            vf y = (vf)((vu)p + (exponent << 23));
            y = x < -126.f ? vf{} : y;
            return x != x ? x : y;
        }
    }

    /// 2**f for |f| <= 0.5, minimax in relative error.
    static vf polynomial(vf f) {
        vf p = f * 1.53458121613e-4f + 1.33999311772e-3f;
        p = p * f + 9.61848895633e-3f;
        p = p * f + 5.55032877711e-2f;
        p = p * f + 2.40226468906e-1f;
        p = p * f + 6.93147205737e-1f;
        return p * f + 1.0f;
    }

    /// tanh(x): odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
    static vf tanh(vf x) {
        const vf a = (vf)((vu)x & 0x7fffffffu);
        const vf z = x * x;
        vf p = z * -5.7379072366e-3f + 2.06719294397e-2f;
        p = p * z - 5.37512183108e-2f;
        p = p * z + 1.33316061091e-1f;
        p = p * z - 3.33332896724e-1f;
        const vf small = x + x * z * p;
        const vf capped = a > 20.f ? S::splat(20.f) : a;
        const vf large = 1.f - 2.f / (exp2(capped * (2.f * log2_e)) + 1.f);
        const vf signed_large = (vf)((vu)large | ((vu)x & 0x80000000u));
        const vf y = a < 0.625f ? small : signed_large;
        return x != x ? x : y;
    }
};

}  // namespace
}  // namespace umfa::cpu
