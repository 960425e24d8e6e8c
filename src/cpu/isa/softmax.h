// Online softmax (Milakov & Gimelshein 2018) for one panel of queries, which lie along the lanes:
// row maxima and sums are plain lane-wise operations.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/lanes.h"
#include "cpu/isa/product.h"

namespace umfa::cpu {
namespace {

/// Groups of S::mr keys of a tile, as one panel computes them.
struct KeyGroups {
    int64_t first, last;            // those with a key that some row sees
    int64_t open_first, open_last;  // those whose scores need no comparison with -inf
    KeyRange all;                   // keys that every row sees, but for a dense mask

    bool empty() const { return first >= last; }
};

template <class S>
struct Panel {  // one panel of queries: nv * W lanes
    static constexpr int N = S::nv * S::W;
    VisibleRows<N> visible;  // of the current tile
    // maximum is in the units of the scores as they are kept: q.k if plain, else log2.
    float tile_maximum[N], alpha[N], maximum[N], sum[N];
    bool fresh;  // no tile so far: O is not set
};

template <class S>
inline void start(Panel<S>& panel) {
    panel.fresh = true;
    for (int j = 0; j < Panel<S>::N; ++j) {
        panel.maximum[j] = -__builtin_inff();
        panel.sum[j] = 0;
    }
}

/// Position of query `row` among the keys, for ALiBi, relative to the tile.
inline int32_t diagonal_of(const Sequence& sequence, int64_t row, int64_t tile) {
    return static_cast<int32_t>(row + sequence.visible.offset - tile);
}

/// How scores become exponents; the same for a whole call, except for the slope.
struct Scoring {
    float scale, scale_low;  // as in ForwardArgs
    float softcap;
    float slope;  // ALiBi, in units of log2
    float floor;  // differences to the maximum below this have the exponential 0
    bool plain;   // scores stay unscaled until the maximum is taken off
};

inline Scoring scoring_of(const ForwardArgs& args, int64_t batch, int64_t head) {
    Scoring s;
    s.scale = args.score_scale;
    s.scale_low = args.score_scale_low;
    s.softcap = args.softcap;
    s.slope = args.slopes
                  ? args.slopes[batch * args.slopes_stride_batch + head * args.slopes_stride_head] *
                        log2_e
                  : 0.f;
    s.plain = args.softcap == 0 && s.slope == 0 && args.score_scale > 0 &&
              args.mask.element == ElementType::none;
    // -inf itself would give inf - inf in the two-float scaling.
    const float lowest = s.plain ? 300.f / s.scale : 300.f;
    s.floor = lowest < 3e38f ? -lowest : -3e38f;
    return s;
}

/// exp(score - maximum), from the difference of the two in the units of Panel::maximum. Plain
/// scores are scaled only here, by a scale of two floats, so that the argument of exp2 is right to
/// its last bits however large the scores are.
template <class S, bool Plain>
inline typename S::vf exponential(const Scoring& scoring, typename S::vf difference) {
    difference = S::max(S::splat(scoring.floor), difference);
    if constexpr (!Plain) return Lanes<S>::exp2(difference);
    return Lanes<S>::exp2(difference * scoring.scale + difference * scoring.scale_low);
}

/// Divisor of a row's O: its sum, with the sink's share. 0 when it saw no key.
inline float divisor_of(const ForwardArgs& args, const Scoring& scoring, int64_t head,
                        float maximum, float sum) {
    if (!args.sinks || sum == 0) return sum;
    const double unit = scoring.plain ? double{scoring.scale} + scoring.scale_low : 1.0;
    return static_cast<float>(sum + __builtin_exp2(args.sinks[head] - maximum * unit));
}

/// LSE of one row, when asked for; `sum` as divisor_of gives it.
inline void store_lse(const ForwardArgs& args, const Scoring& scoring, int64_t batch, int64_t head,
                      int64_t row, float maximum, float sum) {
    if (!args.lse.data) return;
    const Sequence& sequence = args.sequences[batch];
    float* lse = static_cast<float*>(args.lse.data) + sequence.query_batch * args.lse.stride_batch +
                 head * args.lse.stride_head + (sequence.query_row + row) * args.lse.stride_row;
    const double unit = scoring.plain ? double{scoring.scale} + scoring.scale_low : 1.0;
    const double empty = args.sinks ? args.sinks[head] * ln_2 : -__builtin_inf();
    // Beside a sink so large that the sum overflows, the keys do not count.
    const bool sink_only = sum == 0 || (args.sinks && sum > 3e38f);
    *lse = static_cast<float>(sink_only ? empty : (maximum * unit + __builtin_log2(sum)) * ln_2);
}

/// Finishes the scores of MR keys from `first` on: scales, caps, biases and masks them, stores them
/// and updates the tile's maximum. `diagonal`: diagonal_of() for lane 0. `bias`: the dense mask of
/// these keys, laid out as the scores, or null.
template <class S, bool Masked, bool Plain, int MR>
inline __attribute__((always_inline)) void finish_scores(typename S::vf (&acc)[MR][S::nv],
                                                         const Scoring& scoring, int32_t first,
                                                         int32_t diagonal, const float* bias,
                                                         float* scores, Panel<S>& panel) {
    using L = Lanes<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int NV = S::nv, W = S::W;
    vi lane;
    for (int w = 0; w < W; ++w) lane[w] = w;
    for (int n = 0; n < NV; ++n) {
        vf maximum = S::load(panel.tile_maximum + n * W);
        for (int m = 0; m < MR; ++m) {
            vf s = acc[m][n];
            if constexpr (!Plain) {
                s *= scoring.scale;
                if (scoring.softcap != 0) s = scoring.softcap * L::tanh(s);
                if (scoring.slope != 0) {
                    // Exact below 2**24: the distance to the diagonal is taken in integers.
                    const vf distance = S::to_float(lane + (diagonal + n * W - (first + m)));
                    s -= scoring.slope * (vf)((vu)distance & 0x7fffffffu);
                }
                if (bias) {  // -inf hides a key, whatever its score
                    const vf b = S::load(bias + (m * NV + n) * W);
                    s = b == -__builtin_inff() ? b : s + b;
                }
            }
            if constexpr (Masked) {
                const vi seen = sees<vi>(panel.visible, n * W, first + m);
                s = seen ? s : S::splat(-__builtin_inff());
            }
            S::store(scores + (m * NV + n) * W, s);
            maximum = S::max(s, maximum);
        }
        S::store(panel.tile_maximum + n * W, maximum);
    }
}

/// Scores -> probabilities for keys [first, last) of a tile, as units of keys in `units`, which may
/// be `scores`; updates maximum, sum, alpha. All bounds are multiples of U::E. The probability of a
/// score of -inf, which hidden keys have, is -0: it adds nothing, and can be told from one that is
/// merely too small. It may be 0 in [open_first, open_last).
template <class S, class U, bool Plain>
inline void exponentials(const Scoring& scoring, int64_t first, int64_t open_first,
                         int64_t open_last, int64_t last, const float* scores, float* units,
                         Panel<S>& panel) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W, E = U::E;
    constexpr float infinity = __builtin_inff();
    vf pivot[NV], sum[NV];
    for (int n = 0; n < NV; ++n) {
        const vf old = S::load(panel.maximum + n * W);
        const vf now = S::max(S::load(panel.tile_maximum + n * W), old);
        // A lane that has seen no key keeps -inf; 0 stands in, and its exponentials are 0 below.
        pivot[n] = now == -infinity ? vf{} : now;
        vf alpha = exponential<S, Plain>(scoring, old - pivot[n]);
        alpha = old == -infinity ? vf{} : alpha;
        S::store(panel.maximum + n * W, now);
        S::store(panel.alpha + n * W, alpha);
        sum[n] = vf{};
    }
    const auto range = [&](auto masked, int64_t from, int64_t to) {
        for (int64_t k = from; k < to; k += E)
            for (int n = 0; n < NV; ++n) {
                vf p[E];
                for (int e = 0; e < E; ++e) {
                    const vf s = S::load(scores + ((k + e) * NV + n) * W);
                    p[e] = exponential<S, Plain>(scoring, s - pivot[n]);
                    if constexpr (decltype(masked)::value)  // hidden, whatever the scale
                        p[e] = s == -infinity ? S::splat(-0.f) : p[e];
                    sum[n] += p[e];
                }
                S::store(units + (k / E * NV + n) * W, U::pack(p));
            }
    };
    range(Constant<1>{}, first, open_first);
    range(Constant<0>{}, open_first, open_last);
    range(Constant<1>{}, open_last, last);
    for (int n = 0; n < NV; ++n)
        S::store(panel.sum + n * W,
                 sum[n] + S::load(panel.sum + n * W) * S::load(panel.alpha + n * W));
}

}  // namespace
}  // namespace umfa::cpu
