// Weights and values as int8 too, beside scores in int8. Of a tile, each channel of the values has a scale,
// and the weights of a query are relative to its largest in the tile: one large weight takes the others'
// precision in its own tile only. Sums of a tile are exact integers.
#pragma once

#include "cpu/isa/forward_kernel.h"

namespace umfa::cpu {
namespace {

/// U, but for its scores and for the products of weights and values, which are both in units Q.
template <class U, class Q>
struct Int8Values : Int8Scores<U, Q> {
    static constexpr bool int8_values = true;
};

constexpr float largest_weight = 255;

/// Codes of a tile of values, dst[unit of keys][channel], with zeros for channels up to `padded`. The scale of
/// a channel is over its finite numbers; the others are left out. Returns whether there were none.
template <class S, class Q, class T>
inline bool quantise_values(const typename T::storage* const* rows, int64_t keys, int64_t stride,
                            int64_t channels, int64_t padded, int64_t pitch, float* scales,
                            float* dst) {
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int W = S::W, E = Q::weights::E;
    vf not_finite{};
    for (int64_t c = 0; c < padded; c += W) {
        vf largest{};
        for (int64_t k = 0; k < keys; ++k) {
            const vf x = row_units<S, FloatUnits<S, T>>(rows[k], stride, c, channels);
            not_finite += x * 0.f;
            const vf magnitude = (vf)((vu)x & 0x7fffffffu);
            largest = S::max(x * 0.f == 0.f ? magnitude : vf{}, largest);
        }
        const vf step = S::max(largest * (1.f / 127), S::splat(least_step));
        const vf inverse = 1.f / step, magic = S::splat(integer_magic);
        S::store(scales + c, step);
        for (int64_t k = 0; k < keys; k += E) {
            vf codes[E];
            for (int e = 0; e < E; ++e) {
                vf x{};
                if (k + e < keys)
                    x = row_units<S, FloatUnits<S, T>>(rows[k + e], stride, c, channels);
                codes[e] = S::fused(x * 0.f == 0.f ? x : vf{}, inverse, magic);
            }
            S::store(dst + k / E * pitch + c, Q::weights::pack(codes));
        }
    }
    return !S::any((vi)(not_finite != 0.f));
}

/// exponentials() of keys [first, last) as codes. Writes the weight of a code for each lane; where `keeps`,
/// exponentials stay in `scores`, -0 of hidden keys.
template <class S, class Q, bool Plain>
inline void int8_exponentials(const Scoring& scoring, int64_t first, int64_t last, bool keeps,
                              float* scores, float* units, float* weights, Panel<S>& panel) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W, E = Q::weights::E;
    constexpr float infinity = __builtin_inff();
    const vf magic = S::splat(integer_magic);
    for (int n = 0; n < NV; ++n) {
        const vf old = S::load(panel.maximum + n * W), own = S::load(panel.tile_maximum + n * W);
        const vf now = S::max(own, old);
        const vf pivot = now == -infinity ? vf{} : now;
        vf alpha = exponential<S, Plain>(scoring, old - pivot);
        vf weight = exponential<S, Plain>(scoring, own - pivot);
        alpha = old == -infinity ? vf{} : alpha;
        weight = own == -infinity ? vf{} : weight;
        const vf tile_pivot = own == -infinity ? vf{} : own;
        vf sum{};
        for (int64_t k = first; k < last; k += E) {
            vf codes[E];
            for (int e = 0; e < E; ++e) {
                float* at = scores + ((k + e) * NV + n) * W;
                const vf s = S::load(at);
                vf p = exponential<S, Plain>(scoring, s - tile_pivot);
                p = s == -infinity ? S::splat(-0.f) : p;
                sum += p;
                if (keeps) S::store(at, p);
                codes[e] = S::fused(p, S::splat(largest_weight), magic);
            }
            S::store(units + (k / E * NV + n) * W, Q::weights::pack(codes));
        }
        S::store(panel.maximum + n * W, now);
        S::store(panel.alpha + n * W, alpha);
        S::store(panel.sum + n * W, sum * weight + S::load(panel.sum + n * W) * alpha);
        S::store(weights + n * W, weight);
    }
}

/// accumulate() of codes. `scales`: of these MR channels.
template <class S, class Q, int MR>
__attribute__((noinline)) void accumulate_int8(const float* value, int64_t pitch, const float* p,
                                               int64_t units, const float* scales,
                                               const float* weights, const Panel<S>& panel,
                                               float* o) {
    using vf = typename S::vf;
    micro_kernel<S, typename Q::weights, MR>(
        value, pitch, p, units, [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
            for (int n = 0; n < S::nv; ++n) {
                const vf weight = S::load(weights + n * S::W) * (1 / largest_weight);
                for (int m = 0; m < MR; ++m) {
                    float* to = o + (m * S::nv + n) * S::W;
                    vf sum = Q::number(acc[m][n]) * (weight * S::splat(scales[m]));
                    if (!panel.fresh)
                        sum = S::fma(sum, S::load(to), S::load(panel.alpha + n * S::W));
                    S::store(to, sum);
                }
            }
        });
}

template <class S, class U>
struct Int8Block : ForwardBlock<S, U> {
    using Base = ForwardBlock<S, U>;
    using Base::args, Base::at, Base::memory, Base::panel, Base::keys, Base::values, Base::scoring;
    using Base::N, Base::W;
    using typename Base::vf;
    using Q = typename U::scores;
    using Base::Base;
    static constexpr int E = Q::weights::E;

    void load_tile(int64_t first_key) {
        Base::find_tile(first_key);
        Base::load_keys();
        with_units<S, U>(args.types.value, [&](auto units) {
            using T = typename decltype(units)::type;
            using Rows = const typename T::storage* const*;
            values.finite = quantise_values<S, Q, T>(reinterpret_cast<Rows>(Base::v_rows), keys,
                                                     args.value.stride_channel, args.head_dim_v,
                                                     at.channels, at.value_pitch,
                                                     memory + at.value_scales, memory + at.value);
        });
    }

    float* weights_of(int64_t p) const { return Base::lanes_of(p) + 3 * N; }

    void softmax_tile(int64_t p, const KeyGroups& groups) {
        (scoring.plain ? int8_exponentials<S, Q, true>
                       : int8_exponentials<S, Q, false>)(scoring, groups.first, groups.last,
                                                         !values.finite, memory + at.scores,
                                                         memory + at.probabilities, weights_of(p),
                                                         panel[p]);
    }

    void accumulate_tile(int64_t p, const KeyGroups& groups, int64_t next) {
        const int64_t units = (keys + E - 1) / E, first = groups.first / E;
        const int64_t last = groups.last / E < units ? groups.last / E : units;
        const float *value = memory + at.value, *codes = memory + at.probabilities;
        float* out = Base::out_of(p);
        for (int64_t c = 0; c < at.channels; c += S::mr) {
            Base::fetch_mask_after(p, next, c / S::mr, (at.channels + S::mr - 1) / S::mr);
            with_height<S>(Base::height(at.channels - c), [&](auto rows) {
                accumulate_int8<S, Q, decltype(rows)::value>(
                    value + first * at.value_pitch + c, at.value_pitch, codes + first * N,
                    last - first, memory + at.value_scales + c, weights_of(p), panel[p],
                    out + c * N);
            });
        }
        if (!values.finite)
            with_units<S, U>(args.types.value, [&](auto own) {
                add_left_out<typename decltype(own)::type>(groups, weights_of(p), out);
            });
        panel[p].fresh = false;
    }

    /// Adds the values that are not finite. Hidden keys, whose exponentials are -0, add nothing.
    template <class T>
    void add_left_out(const KeyGroups& groups, const float* weights, float* out) {
        using vi = typename S::vi;
        for (int64_t k = groups.first; k < groups.last && k < keys; ++k)
            for (int64_t c = 0; c < args.head_dim_v; c += W) {
                const vf x = row_units<S, FloatUnits<S, T>>(
                    reinterpret_cast<const typename T::storage*>(Base::v_rows[k]),
                    args.value.stride_channel, c, args.head_dim_v);
                for (int i = 0; i < W; ++i) {
                    if (x[i] * 0.f == 0.f) continue;
                    for (int n = 0; n < S::nv; ++n) {
                        const vf e = S::load(memory + at.scores + (k * S::nv + n) * W);
                        float* to = out + ((c + i) * S::nv + n) * W;
                        const vf sum = S::load(to);
                        const vf more = e * S::load(weights + n * W) * x[i];
                        S::store(to, ((vi)e < 0) ? sum : sum + more);
                    }
                }
            }
    }
};

}  // namespace
}  // namespace umfa::cpu
