// From the products of a backward pass to probabilities, and to the gradient of the scores.
#pragma once

#include "cpu/isa/lanes.h"
#include "cpu/isa/softmax.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

/// The rows of one panel of queries.
template <class S>
struct RowStatistics {
    const float *pivot, *pivot_low, *delta;
    VisibleRows<S::nv * S::W> visible;  // of the current tile
};

/// Where P^T or dS^T of some keys goes, each null where it is not wanted: as floats, [key][lane], and in
/// units of U for the products that add to gradients, [key][unit of lanes] and [unit of keys][lane]. Those
/// of floats are one array.
struct Factors {
    float *floats, *by_query, *by_key;
};

template <class S, class U, int MR>
inline __attribute__((always_inline)) void store_factors(const typename S::vf (&x)[MR][S::nv],
                                                         const Factors& to) {
    constexpr int NV = S::nv, W = S::W, E = U::E;
    if (to.floats)
        for (int m = 0; m < MR; ++m)
            for (int n = 0; n < NV; ++n) S::store(to.floats + (m * NV + n) * W, x[m][n]);
    if constexpr (E > 1) {
        static_assert(E == 2 && NV == 2 && MR % 2 == 0);
        if (to.by_query)
            for (int m = 0; m < MR; ++m)
                S::store(to.by_query + m * W, S::narrow_bf16(x[m][0], x[m][1]));
        if (to.by_key)
            for (int m = 0; m < MR; m += E)
                for (int n = 0; n < NV; ++n) {
                    const typename S::vf pair[] = {x[m][n], x[m + 1][n]};
                    S::store(to.by_key + (m / E * NV + n) * W, U::pack(pair));
                }
    }
}

/// |position of the query - position of the key| for W lanes, whose first is `diagonal` keys further.
template <class S>
inline typename S::vf distance_of(int32_t diagonal) {
    using vi = typename S::vi;
    using vu = typename S::vu;
    vi lane;
    for (int w = 0; w < S::W; ++w) lane[w] = w;
    return (typename S::vf)((vu)S::to_float(lane + diagonal) & 0x7fffffffu);
}

/// exp2 of a score relative to the log-sum-exp, which no score exceeds but by rounding: of scores of 1e9
/// and more, that gave infinities.
template <class S>
inline typename S::vf probability(typename S::vf exponent) {
    return Lanes<S>::exp2(S::min(S::splat(0), exponent));
}

/// Makes P^T of MR keys from `first` on out of K Q^T: exp(score - lse), 0 where a key is hidden. `slopes`:
/// the derivative of softcap, where it is on.
template <class S, bool Masked, bool Plain, int MR>
inline __attribute__((always_inline)) void finish_probabilities(
    typename S::vf (&acc)[MR][S::nv], const Scoring& scoring, int32_t first, int32_t diagonal,
    const float* bias, const RowStatistics<S>& rows, float* slopes) {
    using L = Lanes<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    constexpr int NV = S::nv, W = S::W;
    constexpr float infinity = __builtin_inff();
    for (int n = 0; n < NV; ++n) {
        const vf pivot = S::load(rows.pivot + n * W), low = S::load(rows.pivot_low + n * W);
        const vi nothing = pivot == infinity;  // the row saw no key, or is past the last one
        for (int m = 0; m < MR; ++m) {
            // An infinite product would meet scale_low as inf - inf.
            vf s = S::max(S::splat(-3e38f), acc[m][n]);
            vf p;
            vi hidden = nothing;
            if constexpr (Plain) {
                // The scale and the log-sum-exp have two floats each: see exponential().
                p = probability<S>((s * scoring.scale - pivot) + (s * scoring.scale_low - low));
            } else {
                s *= scoring.scale;
                if (scoring.softcap != 0) {
                    const vf t = L::tanh(s);
                    S::store(slopes + (m * NV + n) * W, 1.f - t * t);
                    s = scoring.softcap * t;
                }
                if (scoring.slope != 0)
                    s -= scoring.slope * distance_of<S>(diagonal + n * W - (first + m));
                if (bias) {
                    const vf b = S::load(bias + (m * NV + n) * W);
                    hidden |= b == -infinity;
                    s += b;
                }
                p = probability<S>((s - pivot) - low);
            }
            if constexpr (Masked) hidden |= ~sees<vi>(rows.visible, n * W, first + m);
            if constexpr (Masked || !Plain) p = hidden ? vf{} : p;
            acc[m][n] = p;
        }
    }
}

template <class S, class U, bool Masked, bool Plain, int MR>
__attribute__((noinline)) void probabilities_of(const Scoring& scoring, const float* key,
                                                const float* query, int64_t depth, int32_t first,
                                                int32_t diagonal, const float* bias,
                                                const RowStatistics<S>& rows,
                                                const Factors& probabilities, float* slopes) {
    using vf = typename S::vf;
    micro_kernel<S, U, MR>(key, MR, query, depth,
                           [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
                               finish_probabilities<S, Masked, Plain>(acc, scoring, first, diagonal,
                                                                      bias, rows, slopes);
                               store_factors<S, U>(acc, probabilities);
                           });
}

/// dS^T of MR keys, out of V dO^T: P * (dP - delta). Where P is 0 so is dS, whatever dP: hidden keys
/// may have values of NaN. With dropout `kept` is P where it is kept, and 0 elsewhere; dP counts only
/// there, divided by the share that is kept.
template <class S, class U, bool Drops, int MR>
__attribute__((noinline)) void score_gradients_of(const float* value, const float* dout,
                                                  int64_t depth, const float* delta,
                                                  const float* probabilities, const float* kept,
                                                  float inverse_share, const Factors& gradients) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W;
    micro_kernel<S, U, MR>(
        value, MR, dout, depth, [&](vf(&acc)[MR][NV]) __attribute__((always_inline)) {
            for (int n = 0; n < NV; ++n) {
                const vf less = S::load(delta + n * W);
                for (int m = 0; m < MR; ++m) {
                    const int64_t at = (m * NV + n) * W;
                    const vf p = S::load(probabilities + at);
                    vf d;
                    if constexpr (Drops) {
                        const vf own = S::load(kept + at);
                        const vf seen = own == 0.f ? vf{} : own * inverse_share * acc[m][n];
                        d = seen - p * less;
                    } else {
                        d = p * (acc[m][n] - less);
                    }
                    acc[m][n] = p == 0.f ? vf{} : d;
                }
            }
            store_factors<S, U>(acc, gradients);
        });
}

}  // namespace
}  // namespace umfa::cpu
