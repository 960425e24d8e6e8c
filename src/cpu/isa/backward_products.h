// The products of a backward pass that add to gradients: c[m][channel] += sum_k a[k][m] * b[k][channel].
// Channels lie along the lanes, in panels of S::nv vectors; a's are broadcast. A step is a unit of U: one
// k, or a pair.
#pragma once

#include "cpu/isa/product.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

/// Where the m-th factor of a step is.
template <class S, class U, bool Contiguous>
constexpr int64_t factor_stride = Contiguous ? 1 : S::nv * S::W / U::E;

/// One step: acc[m] += a[m] * b.
template <class S, class U, bool Contiguous, int MR, int NV>
inline __attribute__((always_inline)) void add_products(typename S::vf (&acc)[MR][NV],
                                                        const float* a,
                                                        const typename S::vf (&b)[NV]) {
    if constexpr (Contiguous) {
        S::template multiply_add<U>(acc, a, b);
    } else {
        // On x86 any address can be broadcast by the multiplication itself.
        for (int m = 0; m < MR; ++m) {
            const typename S::vf am = S::splat_bits(a + m * factor_stride<S, U, Contiguous>);
            for (int n = 0; n < NV; ++n) acc[m][n] = U::fma(acc[m][n], am, b[n]);
        }
    }
}

/// Some runs of `depth` steps each. Runs of a begin `a_run` floats apart, those of b follow each
/// other; the next step of a is `a_step` floats further.
struct Runs {
    int64_t count, depth, a_run, a_step;
};

/// c[m * pitch + lane] += the sum over all steps, which starts at zero and is added once.
template <class S, class U, bool Contiguous, int MR, int NV>
__attribute__((noinline)) void add_outer(const float* a, const Runs& runs, const float* b, float* c,
                                         int64_t pitch) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    vf acc[MR][NV];
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = vf{};
    for (int64_t run = 0; run < runs.count; ++run) {
        const float* at = a + run * runs.a_run;
        for (int64_t k = 0; k < runs.depth; ++k) {
            vf bk[NV];
            for (int n = 0; n < NV; ++n) bk[n] = S::load(b + n * W);
            add_products<S, U, Contiguous>(acc, at, bk);
            at += runs.a_step;
            b += S::nv * W;
        }
    }
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NV; ++n) {
            float* to = c + m * pitch + n * W;
            S::store(to, S::load(to) + acc[m][n]);
        }
}

/// The same where b holds inf or NaN: they do not count where the factor is 0. Same operations in the
/// same order, so other sums keep their bits.
template <class S, class U, bool Contiguous, int NV>
__attribute__((noinline)) void add_outer_guarded(int64_t rows, const float* a, const Runs& runs,
                                                 const float* b, float* c, int64_t pitch) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    for (int64_t m = 0; m < rows; ++m)
        for (int n = 0; n < NV; ++n) {
            vf acc{};
            for (int64_t run = 0; run < runs.count; ++run)
                for (int64_t k = 0; k < runs.depth; ++k) {
                    const vf factor = S::splat_bits(a + m * factor_stride<S, U, Contiguous> +
                                                    run * runs.a_run + k * runs.a_step);
                    const vf bk = S::load(b + ((run * runs.depth + k) * S::nv + n) * W);
                    acc = U::fma(acc, factor, U::counted(bk, factor));
                }
            float* to = c + m * pitch + n * W;
            S::store(to, S::load(to) + acc);
        }
}

/// Rows of `channels` channels each; their panels of b lie `b_panel` floats apart.
template <class S, class U, bool Contiguous>
inline void add_rows(int64_t rows, const float* a, const Runs& runs, const float* b,
                     int64_t b_panel, bool finite, int64_t channels, float* c, int64_t pitch) {
    constexpr int64_t N = S::nv * S::W;
    for (int64_t at = 0; at < channels; at += N, b += b_panel) {
        if (!finite)
            add_outer_guarded<S, U, Contiguous, S::nv>(rows, a, runs, b, c + at, pitch);
        else
            with_height<S>(rows, [&](auto height) {
                constexpr int MR = decltype(height)::value;
                (channels - at <= S::W
                     ? add_outer<S, U, Contiguous, MR, 1>
                     : add_outer<S, U, Contiguous, MR, S::nv>)(a, runs, b, c + at, pitch);
            });
    }
}

}  // namespace
}  // namespace umfa::cpu
