// Products of matrices, and the functions of <metal_math> with the errors that fast math may make.

#include <cmath>
#include <cstring>

#include "state.h"

using namespace umfa_runtime;

struct MatrixSlot {
    void* d;
    const void *a, *b, *c;
    unsigned types;
};

static inline float bfloat_to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float r;
    memcpy(&r, &bits, 4);
    return r;
}
static inline uint16_t float_to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Compilers call this for float to bfloat, and not every system's library has it. The result comes
// back where any 16-bit float does.
extern "C" __attribute__((weak)) _Float16 __truncsfbf2(float x) {
    const uint16_t bits = float_to_bfloat(x);
    _Float16 r;
    memcpy(&r, &bits, 2);
    return r;
}

static inline void load_pair(float* to, const void* from, unsigned type) {
    if (type == 2) {
        memcpy(to, from, 8);
    } else if (type == 0) {
        _Float16 h[2];
        memcpy(h, from, 4);
        to[0] = static_cast<float>(h[0]);
        to[1] = static_cast<float>(h[1]);
    } else {
        uint16_t h[2];
        memcpy(h, from, 4);
        to[0] = bfloat_to_float(h[0]);
        to[1] = bfloat_to_float(h[1]);
    }
}
static inline void store_pair(void* to, const float* from, unsigned type) {
    if (type == 2) {
        memcpy(to, from, 8);
    } else if (type == 0) {
        const _Float16 h[2] = {static_cast<_Float16>(from[0]), static_cast<_Float16>(from[1])};
        memcpy(to, h, 4);
    } else {
        const uint16_t h[2] = {float_to_bfloat(from[0]), float_to_bfloat(from[1])};
        memcpy(to, h, 4);
    }
}

// One type for all four operands' conversions where that is known, so that they are straight code.
template <int kTypes>
static void multiply_lanes(umfa_lane_slots* slots) {
    alignas(32) float a[64], b[64], c[64];
    const unsigned types = kTypes >= 0 ? static_cast<unsigned>(kTypes)
                                       : static_cast<MatrixSlot*>(slots->slot[0])->types;
    for (unsigned n = 0; n < kLanes; n++) {
        const MatrixSlot& m = *static_cast<MatrixSlot*>(slots->slot[n]);
        const unsigned at = R.map_row[n] * 8 + R.map_column[n];
        load_pair(a + at, m.a, types >> 2 & 3);
        load_pair(b + at, m.b, types >> 4 & 3);
        load_pair(c + at, m.c, types >> 6 & 3);
    }
    typedef float row __attribute__((vector_size(32)));
    row* rows = reinterpret_cast<row*>(c);
    const row* brows = reinterpret_cast<const row*>(b);
    const bool reverse = R.d->reverse_reductions;
    for (int i = 0; i < 8; i++) {
        row sum = rows[i];
        for (int k = 0; k < 8; k++) {
            const int kk = reverse ? 7 - k : k;
            sum += a[i * 8 + kk] * brows[kk];
        }
        rows[i] = sum;
    }
    for (unsigned n = 0; n < kLanes; n++) {
        const MatrixSlot& m = *static_cast<MatrixSlot*>(slots->slot[n]);
        store_pair(m.d, c + R.map_row[n] * 8 + R.map_column[n], types & 3);
    }
    R.counters.mma++;
}

extern "C" {

void umfa_matrix_multiply(void* d, const void* a, const void* b, const void* c, unsigned types) {
    MatrixSlot slot{d, a, b, c, types};
    constexpr int kFloat = 2 | 2 << 2 | 2 << 4 | 2 << 6;
    constexpr int kHalf = 2 | 0 << 2 | 0 << 4 | 2 << 6;
    rendezvous(&slot,
               types == kFloat  ? multiply_lanes<kFloat>
               : types == kHalf ? multiply_lanes<kHalf>
                                : multiply_lanes<-1>,
               1);
}

// Up to `ulps` units in the last place, up or down, decided by the argument alone.
static float noisy(float x, float r, unsigned accuracy, float ulps) {
    if (accuracy != 0 || !R.d->math_noise || !(std::fabs(r) < INFINITY) || r == 0) return r;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t h = (bits ^ bits >> 15) * 0x2c1b3c6dU;
    h = (h ^ h >> 12) * 0x297a2d39U;
    h ^= h >> 15;
    const int n = static_cast<int>(ulps);
    const int k = static_cast<int>(h % static_cast<uint32_t>(2 * n + 1)) - n;
    int32_t out;
    memcpy(&out, &r, 4);
    out += k;
    float y;
    memcpy(&y, &out, 4);
    return std::fabs(y) < INFINITY ? y : r;
}

// The bounds are those of Metal's fast functions.
float umfa_exp(float x, unsigned a) {
    R.counters.exp++;
    return noisy(x, expf(x), a, 3 + std::floor(std::min(std::fabs(2 * x), 1e4f)));
}
float umfa_exp2(float x, unsigned a) {
    R.counters.exp2++;
    return noisy(x, exp2f(x), a, 3 + std::floor(std::min(std::fabs(2 * x), 1e4f)));
}
float umfa_exp10(float x, unsigned a) {
    R.counters.exp++;
    return noisy(x, powf(10.0f, x), a, 3 + std::floor(std::min(std::fabs(2 * x), 1e4f)));
}
#define UMFA_RUNTIME_1(name, function, ulps) \
    float umfa_##name(float x, unsigned a) { return noisy(x, function(x), a, ulps); }
UMFA_RUNTIME_1(log, logf, 3)
UMFA_RUNTIME_1(log2, log2f, 2)
UMFA_RUNTIME_1(log10, log10f, 3)
UMFA_RUNTIME_1(sin, sinf, 4)
UMFA_RUNTIME_1(cos, cosf, 4)
UMFA_RUNTIME_1(tan, tanf, 6)
UMFA_RUNTIME_1(asin, asinf, 5)
UMFA_RUNTIME_1(acos, acosf, 5)
UMFA_RUNTIME_1(atan, atanf, 5)
UMFA_RUNTIME_1(sinh, sinhf, 5)
UMFA_RUNTIME_1(cosh, coshf, 5)
UMFA_RUNTIME_1(asinh, asinhf, 5)
UMFA_RUNTIME_1(acosh, acoshf, 5)
UMFA_RUNTIME_1(atanh, atanhf, 5)
float umfa_rsqrt(float x, unsigned a) { return noisy(x, 1.0f / sqrtf(x), a, 2); }
float umfa_tanh(float x, unsigned a) {
    // Fast tanh is (t - 1) / (t + 1) with t = exp(2x): past 44 it is inf / inf.
    if (a == 0 && R.d->math_noise) {
        const float t = expf(2 * x);
        return (t - 1) / (t + 1);
    }
    return tanhf(x);
}
float umfa_pow(float x, float y, unsigned a) { return noisy(x, powf(x, y), a, 16); }
float umfa_atan2(float y, float x, unsigned a) { return noisy(x, atan2f(y, x), a, 6); }
float umfa_fmod(float x, float y) { return fmodf(x, y); }
}  // extern "C"
