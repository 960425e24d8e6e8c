// The micro-kernel of both products: c[m][lanes] = sum_k a[k][m] * b[k][lanes], MR x (NV vectors)
// of accumulators in registers. `a` has MR units in a row, each broadcast, and the next step's
// `a_step` units further; `b` holds NV vectors per step. The caller's `done(acc)` takes the sums
// while they are still in registers: scores are scaled, masked and compared with the running
// maximum there.
//
// AVX-512 on Zen 4: 24 accumulators; 12 broadcasts + 2 loads feed 24 FMAs.
#pragma once

#include <stdint.h>

namespace umfa::cpu {
namespace {

/// `begin(n)`: what the sums of vector n begin with.
template <class S, class U, int MR, class Begin, class Done>
inline __attribute__((always_inline)) void micro_kernel(const float* a, int64_t a_step,
                                                        const float* b, int64_t depth,
                                                        Begin&& begin, Done&& done) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W;
    vf acc[MR][NV];
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = begin(n);
    for (int64_t k = 0; k < depth; ++k) {
        vf bk[NV];
        for (int n = 0; n < NV; ++n) bk[n] = S::load(b + n * W);
        S::template multiply_add<U>(acc, a, bk);
        a += a_step;
        b += NV * W;
    }
    done(acc);
}

/// Sums that begin with 0.
template <class S, class U, int MR, class Done>
inline __attribute__((always_inline)) void micro_kernel(const float* a, int64_t a_step,
                                                        const float* b, int64_t depth,
                                                        Done&& done) {
    micro_kernel<S, U, MR>(
        a, a_step, b, depth, [](int) __attribute__((always_inline)) { return typename S::vf{}; },
        static_cast<Done&&>(done));
}

/// Panels hold S::mr rows, the last one the rest, rounded up to a multiple of S::mr / 3: few sizes
/// to compile, and few rows computed in vain.
template <class S>
constexpr int row_step = S::mr % 3 == 0 ? S::mr / 3 : S::mr;

template <class S>
constexpr int64_t padded_rows(int64_t rows) {
    return (rows + row_step<S> - 1) / row_step<S> * row_step<S>;
}

/// Calls f(Constant<MR>{}) for the panel height `rows`.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <class S, int MR = S::mr, class F>
inline void with_height(int64_t rows, F&& f) {
    if constexpr (MR == row_step<S>)
        f(Constant<MR>{});
    else if (rows == MR)
        f(Constant<MR>{});
    else
        with_height<S, MR - row_step<S>>(rows, static_cast<F&&>(f));
}

}  // namespace
}  // namespace umfa::cpu
