// The functions of <metal_math> for the NVIDIA back end, in plain C, so that a host can test them.
//
// Fast versions are the special function unit where it has one (errors are NVIDIA's: ex2 2^-22.5
// relative, lg2 2^-22 absolute near 1, sin and cos 2^-20.9 absolute to pi). Precise versions are
// computed in double and rounded once (0.51 ulp; sin and cos while |x| < 1e9), but for exp, exp2 and
// tanh, which kernels call in inner loops: those are float, within 2 ulp.
#pragma once

#define UMFA_MATH inline __attribute__((always_inline))

namespace umfa_ptx_math {

constexpr double ln2 = 0.693147180559945309417, half_pi = 1.57079632679489661923;
constexpr float infinity = __builtin_huge_valf(), not_a_number = __builtin_nanf("");

UMFA_MATH unsigned bits(float x) { return __builtin_bit_cast(unsigned, x); }
UMFA_MATH bool is_nan(float x) { return (bits(x) & 0x7fffffffU) > 0x7f800000U; }
UMFA_MATH float absolute(float x) { return __builtin_fabsf(x); }
UMFA_MATH float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// ---- float ---------------------------------------------------------------------------------------

/// x * 2^n, |n| <= 250: in two steps, so that a result below the normal numbers is rounded once.
UMFA_MATH float scale(float x, int n) {
    const int first = n / 2, second = n - first;
    return x * __builtin_bit_cast(float, (first + 127) << 23) *
           __builtin_bit_cast(float, (second + 127) << 23);
}
/// e^r for |r| <= ln(2) / 2, by its series.
UMFA_MATH float exp_small(float r) {
    float p = 0x1.a01a02p-13f;  // 1 / 7!
    p = __builtin_fmaf(p, r, 0x1.6c16c2p-10f);
    p = __builtin_fmaf(p, r, 0x1.111112p-7f);
    p = __builtin_fmaf(p, r, 0x1.555556p-5f);
    p = __builtin_fmaf(p, r, 0x1.555556p-3f);
    p = __builtin_fmaf(p, r, 0.5f);
    return 1.0f + __builtin_fmaf(p * r, r, r);
}
UMFA_MATH float precise_exp(float x) {
    if (is_nan(x)) return x;
    x = clamp(x, 110.0f);
    const float n = __builtin_rintf(x * 0x1.715476p0f);
    float r = __builtin_fmaf(n, -0x1.62e400p-1f, x);  // ln(2) in two parts
    r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, r);
    return scale(exp_small(r), static_cast<int>(n));
}
UMFA_MATH float precise_exp2(float x) {
    if (is_nan(x)) return x;
    x = clamp(x, 160.0f);
    const float n = __builtin_rintf(x);
    return scale(exp_small((x - n) * 0x1.62e430p-1f), static_cast<int>(n));
}
UMFA_MATH float precise_tanh(float x) {
    const float a = absolute(x), s = x * x;
    if (a < 0.55f) {
        float p = 0x1.4b66cep-9f;  // fitted to (tanh(x) / x - 1) / x^2, error 1e-10
        p = __builtin_fmaf(p, s, -0x1.1770bep-7f);
        p = __builtin_fmaf(p, s, 0x1.657ae0p-6f);
        p = __builtin_fmaf(p, s, -0x1.ba1444p-5f);
        p = __builtin_fmaf(p, s, 0x1.111106p-3f);
        p = __builtin_fmaf(p, s, -0x1.555556p-2f);
        return __builtin_fmaf(p * s, x, x);
    }
    const float r = 1.0f - 2.0f / (precise_exp(2.0f * a) + 1.0f);
    return is_nan(x) ? x : __builtin_copysignf(r, x);
}

// ---- double, for what no inner loop calls --------------------------------------------------------

UMFA_MATH double power_of_2(int n) {
    return __builtin_bit_cast(double, static_cast<unsigned long>(n + 1023) << 52);
}
/// |x| <= 300.
UMFA_MATH double exp_double(double x) {
    const double n = __builtin_rint(x / ln2);
    const double r = __builtin_fma(n, -2.319046813846299558e-17, __builtin_fma(n, -ln2, x));
    double p = 1.0;
    for (int k = 13; k > 0; k--) p = __builtin_fma(p, r / k, 1.0);
    return p * power_of_2(static_cast<int>(n));
}
/// x positive and finite, and no double denormal.
UMFA_MATH double log_double(double x) {
    const unsigned long b = __builtin_bit_cast(unsigned long, x);
    int n = static_cast<int>(b >> 52) - 1023;
    double m = __builtin_bit_cast(double, (b & 0xfffffffffffffUL) | 1023UL << 52);
    if (m > 1.41421356) {
        m /= 2;
        n++;
    }
    const double s = (m - 1) / (m + 1), square = s * s;
    double p = 0;
    for (int k = 19; k > 0; k -= 2) p = __builtin_fma(p, square, 1.0 / k);
    return __builtin_fma(static_cast<double>(n), ln2, 2 * s * p);
}
/// Sine of x + quarter * pi / 2.
UMFA_MATH double sin_double(double x, int quarter) {
    const double n = __builtin_rint(x / half_pi);
    double r = __builtin_fma(n, -half_pi, x);
    r = __builtin_fma(n, -6.123233995736766036e-17, r);
    const double square = r * r;
    const long turn = static_cast<long>(n) + quarter;
    double p = 1.0;  // cosine's series or sine's, each term from the next
    if (turn & 1) {
        for (int k = 16; k > 0; k -= 2) p = __builtin_fma(-p, square / (k * (k - 1)), 1.0);
    } else {
        for (int k = 17; k > 1; k -= 2) p = __builtin_fma(-p, square / (k * (k - 1)), 1.0);
        p *= r;
    }
    return turn & 2 ? -p : p;
}
/// Angle of (x, y), not both zero, not both infinite.
UMFA_MATH double atan2_double(double y, double x) {
    const double a = __builtin_fabs(y), b = __builtin_fabs(x);
    double t = a < b ? a / b : b / a, start = 0;
    if (t > 0.4142135623730950488) {
        t = (t - 1) / (t + 1);
        start = half_pi / 2;
    }
    const double square = t * t;
    double p = 0;
    for (int k = 37; k > 0; k -= 2) p = __builtin_fma(-p, square, 1.0 / k);
    double r = start + t * p;
    if (!(a < b)) r = half_pi - r;
    if (x < 0) r = 2 * half_pi - r;
    return y < 0 ? -r : r;
}

UMFA_MATH float exp10(float x) {
    return is_nan(x) ? x : static_cast<float>(exp_double(clamp(x, 60.0f) * 2.302585092994045684));
}
UMFA_MATH float log_times(float x, double factor) {
    if (is_nan(x) || x == infinity) return x;
    if (x <= 0) return x == 0 ? -infinity : not_a_number;
    return static_cast<float>(log_double(x) * factor);
}
UMFA_MATH float sine(float x, int quarter) {
    if (!(absolute(x) < infinity)) return not_a_number;
    if (x == 0 && quarter == 0) return x;
    return static_cast<float>(sin_double(x, quarter));
}
UMFA_MATH float tangent(float x) {
    if (!(absolute(x) < infinity)) return not_a_number;
    return x == 0 ? x : static_cast<float>(sin_double(x, 0) / sin_double(x, 1));
}
UMFA_MATH float atan2(float y, float x) {
    if (is_nan(x) || is_nan(y)) return not_a_number;
    double a = y, b = x;
    if (absolute(x) == infinity && absolute(y) == infinity) {
        a = __builtin_copysign(1.0, a);
        b = __builtin_copysign(1.0, b);
    }
    if (y == 0) {
        const float r = bits(x) >> 31 ? static_cast<float>(2 * half_pi) : 0.0f;
        return __builtin_copysignf(r, y);
    }
    return static_cast<float>(atan2_double(a, b));
}
UMFA_MATH float asin(float x) {
    if (!(absolute(x) <= 1)) return not_a_number;
    const double d = x;
    return x == 0 ? x : static_cast<float>(atan2_double(d, __builtin_sqrt((1 - d) * (1 + d))));
}
UMFA_MATH float acos(float x) {
    if (!(absolute(x) <= 1)) return not_a_number;
    const double d = x;
    return x == 1 ? 0.0f : static_cast<float>(atan2_double(__builtin_sqrt((1 - d) * (1 + d)), d));
}
// The odd hyperbolic functions near 0, where their formulas cancel: x + third * x^3.
UMFA_MATH float cubic(float x, double third) {
    const double d = x;
    return static_cast<float>(d + d * d * d * third);
}
UMFA_MATH float sinh(float x) {
    if (is_nan(x)) return x;
    if (absolute(x) < 1e-3f) return cubic(x, 1.0 / 6);
    const double e = exp_double(clamp(x, 100.0f));
    return static_cast<float>((e - 1 / e) / 2);
}
UMFA_MATH float cosh(float x) {
    if (is_nan(x)) return x;
    const double e = exp_double(clamp(x, 100.0f));
    return static_cast<float>((e + 1 / e) / 2);
}
UMFA_MATH float asinh(float x) {
    if (absolute(x) < 1e-3f) return cubic(x, -1.0 / 6);
    if (!(absolute(x) < infinity)) return x;
    const double a = absolute(x);
    return __builtin_copysignf(static_cast<float>(log_double(a + __builtin_sqrt(a * a + 1))), x);
}
UMFA_MATH float acosh(float x) {
    if (!(x >= 1)) return not_a_number;
    if (x == infinity) return x;
    const double a = x;
    return x == 1 ? 0.0f : static_cast<float>(log_double(a + __builtin_sqrt(a * a - 1)));
}
UMFA_MATH float atanh(float x) {
    if (absolute(x) < 1e-3f) return cubic(x, 1.0 / 3);
    if (!(absolute(x) < 1))
        return absolute(x) == 1 ? __builtin_copysignf(infinity, x) : not_a_number;
    const double d = x;
    return static_cast<float>(log_double((1 + d) / (1 - d)) / 2);
}
UMFA_MATH float pow(float x, float y) {
    if (y == 0 || x == 1) return 1.0f;
    if (is_nan(x) || is_nan(y)) return not_a_number;
    const float a = absolute(x), whole = __builtin_truncf(y);
    const bool odd = whole == y && absolute(y) < 16777216.0f && static_cast<int>(y) & 1;
    float r;
    if (a == 1) {
        r = 1.0f;
    } else if (a == 0 || a == infinity || absolute(y) == infinity) {
        const bool grows = a > 1;
        r = grows == (y > 0) ? infinity : 0.0f;
    } else {
        const double e = static_cast<double>(y) * log_double(a);
        r = static_cast<float>(exp_double(e > 200 ? 200 : e < -200 ? -200 : e));
    }
    if (!(bits(x) >> 31)) return r;
    if (whole != y && a != 0 && a != infinity) return not_a_number;
    return odd ? -r : r;
}
/// Exact, one bit of the quotient at a time.
UMFA_MATH float fmod(float x, float y) {
    const float a = absolute(x);
    float b = absolute(y);
    if (!(a < infinity) || is_nan(y) || b == 0) return not_a_number;
    if (b > a) return x;
    double r = a, step = b;
    while (step * 2 <= r) step *= 2;
    for (; step >= b; step /= 2)
        if (r >= step) r -= step;
    return __builtin_copysignf(static_cast<float>(r), x);
}

}  // namespace umfa_ptx_math

// ---- the names that <metal_math> calls; accuracy 0 is fast ---------------------------------------

#ifdef __NVPTX__
// Not volatile: functions of their argument alone.
#define UMFA_SPECIAL_FUNCTION(name, instruction)                                \
    UMFA_MATH float umfa_special_##name(float x) {                              \
        float y;                                                                \
        [[clang::noconvergent]] asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); \
        return y;                                                               \
    }
UMFA_SPECIAL_FUNCTION(exp2, "ex2.approx.ftz.f32")
UMFA_SPECIAL_FUNCTION(log2, "lg2.approx.f32")
UMFA_SPECIAL_FUNCTION(sin, "sin.approx.f32")
UMFA_SPECIAL_FUNCTION(cos, "cos.approx.f32")
UMFA_SPECIAL_FUNCTION(rsqrt, "rsqrt.approx.f32")
#undef UMFA_SPECIAL_FUNCTION
#define UMFA_FAST(expression) \
    if (accuracy == 0) return expression;
#else
#define UMFA_FAST(expression)
#endif

UMFA_MATH float umfa_exp(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_exp2(x * 1.44269504f))
    return umfa_ptx_math::precise_exp(x);
}
UMFA_MATH float umfa_exp2(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_exp2(x))
    return umfa_ptx_math::precise_exp2(x);
}
UMFA_MATH float umfa_log(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_log2(x) * 0.693147181f)
    return umfa_ptx_math::log_times(x, 1);
}
UMFA_MATH float umfa_log2(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_log2(x))
    return umfa_ptx_math::log_times(x, 1.44269504088896340736);
}
UMFA_MATH float umfa_log10(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_log2(x) * 0.301029996f)
    return umfa_ptx_math::log_times(x, 0.434294481903251827651);
}
UMFA_MATH float umfa_sin(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_sin(x))
    return umfa_ptx_math::sine(x, 0);
}
UMFA_MATH float umfa_cos(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_cos(x))
    return umfa_ptx_math::sine(x, 1);
}
UMFA_MATH float umfa_rsqrt(float x, [[maybe_unused]] unsigned accuracy) {
    UMFA_FAST(umfa_special_rsqrt(x))
    return 1.0f / __builtin_sqrtf(x);
}
UMFA_MATH float umfa_exp10(float x, unsigned) { return umfa_ptx_math::exp10(x); }
UMFA_MATH float umfa_tan(float x, unsigned) { return umfa_ptx_math::tangent(x); }
UMFA_MATH float umfa_asin(float x, unsigned) { return umfa_ptx_math::asin(x); }
UMFA_MATH float umfa_acos(float x, unsigned) { return umfa_ptx_math::acos(x); }
UMFA_MATH float umfa_atan(float x, unsigned) { return umfa_ptx_math::atan2(x, 1.0f); }
UMFA_MATH float umfa_atan2(float y, float x, unsigned) { return umfa_ptx_math::atan2(y, x); }
UMFA_MATH float umfa_sinh(float x, unsigned) { return umfa_ptx_math::sinh(x); }
UMFA_MATH float umfa_cosh(float x, unsigned) { return umfa_ptx_math::cosh(x); }
UMFA_MATH float umfa_tanh(float x, unsigned) { return umfa_ptx_math::precise_tanh(x); }
UMFA_MATH float umfa_asinh(float x, unsigned) { return umfa_ptx_math::asinh(x); }
UMFA_MATH float umfa_acosh(float x, unsigned) { return umfa_ptx_math::acosh(x); }
UMFA_MATH float umfa_atanh(float x, unsigned) { return umfa_ptx_math::atanh(x); }
UMFA_MATH float umfa_pow(float x, float y, unsigned) { return umfa_ptx_math::pow(x, y); }
UMFA_MATH float umfa_fmod(float x, float y) { return umfa_ptx_math::fmod(x, y); }
