// Both products of attention by matrix registers, for units U with U::tiles. A tile has 16 rows of 16
// units; C[m][n] += sum_k A[m][k] * B[k][n] takes whole tiles only.
//
// The layouts are those of forward_kernel.h, transposed scores included: what is broadcast there, K and
// V^T, is A here, with a row for each key or channel; Q and P^T are B as they are. Two tiles of A and
// two of B feed four of C: one load for each product.
//
// A product takes 32 keys at a time, from multiples of 32 on whichever keys are seen, so that the bits
// of a row do not depend on others.
#pragma once

#include "cpu/isa/int8_scores.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/softmax.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

constexpr int64_t unit_bytes = 4;
/// Two tiles of A, one below the other.
constexpr int64_t pair_floats = 2 * tile_units * tile_units;

/// Copies `count` rows into pairs of tiles, [row / 32][step][row % 32][unit], with zeros up to `height`
/// rows and whole tiles. A row has `steps` of them in all; `dst` is the place of its first unit.
template <class S, class U>
inline void pack_tile_rows(const typename U::storage* const* rows, int64_t count,
                           int64_t stride_channel, int64_t height, int64_t channels, int64_t steps,
                           float* dst) {
    const int64_t units = (channels + U::E - 1) / U::E;
    for (int64_t r = 0; r < height; ++r) {
        float* to =
            dst + r / (2 * tile_units) * steps * pair_floats + r % (2 * tile_units) * tile_units;
        for (int64_t u = 0; u < units; u += S::W, to += pair_floats)
            S::store(to, r < count ? row_units<S, U>(rows[r], stride_channel, u, channels)
                                   : typename S::vf{});
    }
}

/// Transposes a tile of V into pairs of tiles, [channel / 32][step][channel % 32][unit of keys], with
/// zeros up to whole tiles. There is room for `steps` of each channel.
template <class S, class U>
inline PackedValues pack_tile_columns(const typename U::storage* const* rows, int64_t count,
                                      int64_t stride_channel, int64_t channels, int64_t steps,
                                      float* dst) {
    constexpr int W = S::W;
    static_assert(W == tile_units && U::E == 2);
    typename U::Extremes extremes;
    const auto pack = [&](auto leave_out) {
        for (int64_t u = 0; u < (count + 1) / 2; u += W)
            for (int64_t c = 0; c < channels; c += W) {
                typename S::vf x[W];
                for (int i = 0; i < W; ++i) {
                    const int64_t k = (u + i) * 2;
                    const typename U::storage* pair[] = {k < count ? rows[k] : nullptr,
                                                         k + 1 < count ? rows[k + 1] : nullptr};
                    x[i] = paired_channels<S, U>(pair, stride_channel, c, channels);
                    if constexpr (decltype(leave_out)::value)
                        x[i] = U::without_extremes(x[i]);
                    else
                        extremes.add(x[i]);
                }
                S::transpose(x);
                float* to = dst + (c / (2 * W) * steps + u / W) * pair_floats + c % (2 * W) * W;
                for (int i = 0; i < W; ++i) S::store(to + i * W, x[i]);
            }
    };
    pack(Constant<0>{});
    const PackedValues found{extremes.found(U::tiny), extremes.finite()};
    if (found.tiny) pack(Constant<1>{});
    return found;
}

/// The four tiles of C, or the first two: Rows tiles of A beside two of B. C and B have rows of 32. Q: the
/// units of A and B.
template <class Tiles, class Q, int Rows>
struct Accumulators {
    static constexpr int64_t pitch = 2 * tile_units * unit_bytes, a_pitch = tile_units * unit_bytes;

    static void zero() {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        if constexpr (Rows == 2) {
            Tiles::template zero<2>();
            Tiles::template zero<3>();
        }
    }
    static void load(const float* c) {
        Tiles::template load<0>(c, pitch);
        Tiles::template load<1>(c + tile_units, pitch);
        if constexpr (Rows == 2) {
            Tiles::template load<2>(c + pair_floats, pitch);
            Tiles::template load<3>(c + pair_floats + tile_units, pitch);
        }
    }
    static void store(float* c) {
        Tiles::template store<0>(c, pitch);
        Tiles::template store<1>(c + tile_units, pitch);
        if constexpr (Rows == 2) {
            Tiles::template store<2>(c + pair_floats, pitch);
            Tiles::template store<3>(c + pair_floats + tile_units, pitch);
        }
    }
    static void step(const float* a, const float* b) {
        Tiles::template load<6>(b, pitch);
        Tiles::template load<4>(a, a_pitch);
        Q::template multiply_add<Tiles, 0, 4, 6>();
        Tiles::template load<7>(b + tile_units, pitch);
        Q::template multiply_add<Tiles, 1, 4, 7>();
        if constexpr (Rows == 2) {
            Tiles::template load<5>(a + tile_units * tile_units, a_pitch);
            Q::template multiply_add<Tiles, 2, 5, 6>();
            Q::template multiply_add<Tiles, 3, 5, 7>();
        }
    }
};

/// C += A B, of whole tiles. B and C have the 32 lanes of a panel.
struct TileProduct {
    const float* a;
    int64_t a_pitch;  // from one pair of rows of tiles to the next
    const float* b;
    float* c;
    int64_t rows;   // of A and C, in tiles
    int64_t depth;  // of the sums, in tiles
    bool fresh;     // C was not set before: it begins at 0

    int64_t steps() const { return (rows + 1) / 2 * depth; }
};

/// The product, and meanwhile() after each step: the matrix unit works beside the vector units, but only
/// as far as the CPU looks ahead.
template <class Tiles, class Q, class Meanwhile>
inline __attribute__((always_inline)) void multiply(const TileProduct& product,
                                                    Meanwhile&& meanwhile) {
    const auto rows_of = [&](auto rows, const float* a, float* c) __attribute__((always_inline)) {
        using C = Accumulators<Tiles, Q, decltype(rows)::value>;
        if (product.fresh)
            C::zero();
        else
            C::load(c);
        const float* b = product.b;
        for (int64_t k = 0; k < product.depth; ++k, a += pair_floats, b += pair_floats) {
            C::step(a, b);
            meanwhile();
        }
        C::store(c);
    };
    int64_t row = 0;
    for (; row + 2 <= product.rows; row += 2)
        rows_of(Constant<2>{}, product.a + row / 2 * product.a_pitch,
                product.c + row / 2 * (2 * pair_floats));
    if (row < product.rows)
        rows_of(Constant<1>{}, product.a + row / 2 * product.a_pitch,
                product.c + row / 2 * (2 * pair_floats));
}

/// finish_scores() of keys [first, last), whose products are in `scores`. Groups inside
/// [seen_begin, seen_end) are seen by every row.
template <class S, class Q, bool Plain>
inline void finish_tile_scores(const Scoring& scoring, const ScoreScales& scales, int64_t first,
                               int64_t last, int64_t seen_begin, int64_t seen_end, int32_t diagonal,
                               const float* bias, float* scores, Panel<S>& panel) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W, MR = 8;
    constexpr int64_t N = NV * W;
    for (int64_t k = first; k < last; k += MR) {
        vf acc[MR][NV];
        for (int m = 0; m < MR; ++m)
            for (int n = 0; n < NV; ++n) acc[m][n] = S::load(scores + (k + m) * N + n * W);
        if constexpr (Q::quantised) scale_scores<S, Q>(scales, k, acc);
        const float* own = bias ? bias + k * N : nullptr;
        if (k < seen_begin || k + MR > seen_end) {
            finish_scores<S, true, Plain>(acc, scoring, static_cast<int32_t>(k), diagonal, own,
                                          scores + k * N, panel);
        } else if constexpr (Plain) {
            if constexpr (Q::quantised)
                for (int m = 0; m < MR; ++m)
                    for (int n = 0; n < NV; ++n) S::store(scores + (k + m) * N + n * W, acc[m][n]);
            // A NaN may hide other scores here: its row is NaN whatever they are.
            for (int n = 0; n < NV; ++n) {
                for (int half = MR / 2; half > 0; half /= 2)
                    for (int m = 0; m < half; ++m) acc[m][n] = S::max(acc[m][n], acc[m + half][n]);
                S::store(panel.tile_maximum + n * W,
                         S::max(acc[0][n], S::load(panel.tile_maximum + n * W)));
            }
        } else {
            finish_scores<S, false, Plain>(acc, scoring, static_cast<int32_t>(k), diagonal, own,
                                           scores + k * N, panel);
        }
    }
}

/// 2**(difference * scale), 0 below 2**-126.5, NaN stays NaN; within 2.1 ulp, and 1 for 0. With fewer
/// operations than exponential(): a scale of one float errs by 2**-24 of the exponent, which is much only
/// where the result is nothing beside 1.
template <class S>
inline typename S::vf tile_exponential(typename S::vf difference, typename S::vf scale) {
    using vf = typename S::vf;
    const vf magic = S::splat(12582912.f);  // 1.5 * 2**23: adding it rounds to an integer
    const vf whole = S::fma(magic, difference, scale) - magic;
    const vf f = S::fma(-whole, difference, scale);
    vf p = f * 1.326472731307e-3f + 9.671512991190e-3f;
    p = p * f + 5.550733581185e-2f;
    p = p * f + 2.402224242687e-1f;
    p = p * f + 6.931470036507e-1f;
    p = p * f + 1.0f;
    return S::scale_unless_tiny(p, whole, whole);
}

/// exponentials() by tile_exponential(), some units of keys at a time. All keys are compared with -inf,
/// unless none is Masked.
template <class S, class U, bool Plain, bool Masked>
class TileExponentials {
    using vf = typename S::vf;
    static constexpr int NV = S::nv, W = S::W, E = U::E;
    static constexpr float infinity = __builtin_inff();

public:
    TileExponentials(const Scoring& scoring, const KeyGroups& groups, const float* first_scores,
                     float* first_units, Panel<S>& own_panel)
        : panel(own_panel),
          scores(first_scores + groups.first * NV * W),
          units(first_units + groups.first / E * NV * W),
          left((groups.last - groups.first) / E),
          scale(S::splat(Plain ? scoring.scale : 1.f)) {
        for (int n = 0; n < NV; ++n) {
            const vf old = S::load(panel.maximum + n * W);
            const vf now = S::max(S::load(panel.tile_maximum + n * W), old);
            // A lane that has seen no key keeps -inf; 0 stands in, and its exponentials are 0 below.
            pivot[n] = now == -infinity ? vf{} : now;
            S::store(panel.maximum + n * W, now);
            S::store(panel.alpha + n * W, tile_exponential<S>(old - pivot[n], scale));
            sum[n] = vf{};
        }
    }

    inline __attribute__((always_inline)) void take(int64_t count) {
        if (count > left) count = left;
        left -= count;
        for (int64_t i = 0; i < count; ++i, scores += E * NV * W, units += NV * W)
            for (int n = 0; n < NV; ++n) {
                vf p[E];
                for (int e = 0; e < E; ++e) {
                    const vf s = S::load(scores + (e * NV + n) * W);
                    p[e] = tile_exponential<S>(s - pivot[n], scale);
                    if constexpr (Masked)  // hidden, whatever the scale
                        p[e] = s == -infinity ? S::splat(-0.f) : p[e];
                    sum[n] += p[e];
                }
                S::store(units + n * W, U::pack(p));
            }
    }

    void finish() {
        take(left);
        for (int n = 0; n < NV; ++n)
            S::store(panel.sum + n * W,
                     sum[n] + S::load(panel.sum + n * W) * S::load(panel.alpha + n * W));
    }

private:
    Panel<S>& panel;
    const float* scores;
    float* units;
    int64_t left;
    const vf scale;
    vf pivot[NV], sum[NV];
};

/// Both products, and exponentials meanwhile.
template <class S, class U, bool Plain, bool Masked>
__attribute__((noinline)) void take_exponentials(const Scoring& scoring, const KeyGroups& groups,
                                                 const float* scores, float* units, Panel<S>& panel,
                                                 const TileProduct& first,
                                                 const TileProduct& second) {
    using Tiles = typename S::Tiles;
    TileExponentials<S, U, Plain, Masked> exponentials(scoring, groups, scores, units, panel);
    const int64_t steps = first.steps() + second.steps();
    const int64_t count = (groups.last - groups.first) / U::E / (steps > 0 ? steps : 1);
    const int64_t each = count > 0 ? count : 1;
    const auto meanwhile = [&]() __attribute__((always_inline)) { exponentials.take(each); };
    multiply<Tiles, typename U::scores>(first, meanwhile);
    multiply<Tiles, U>(second, meanwhile);
    exponentials.finish();
}

/// O^T = O^T * alpha, where some lane's alpha is not 1.
template <class S>
inline void rescale(const Panel<S>& panel, int64_t channels, float* o) {
    using vf = typename S::vf;
    using vi = typename S::vi;
    for (int n = 0; n < S::nv; ++n) {
        const vf alpha = S::load(panel.alpha + n * S::W);
        if (!S::any((vi)(alpha != 1.f))) continue;
        for (int64_t c = 0; c < channels; ++c) {
            float* at = o + (c * S::nv + n) * S::W;
            S::store(at, S::load(at) * alpha);
        }
    }
}

}  // namespace
}  // namespace umfa::cpu
