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

#include "cpu/isa/pack.h"
#include "cpu/isa/softmax.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

constexpr int64_t tile_units = 16;  // rows, and units of a row
constexpr int64_t unit_bytes = 4;

inline int64_t whole_tiles(int64_t rows) {
    return (rows + tile_units - 1) / tile_units * tile_units;
}

/// Copies `count` rows: dst[row * pitch + unit], with zeros up to `height` rows and whole tiles.
template <class S, class U>
inline void pack_tile_rows(const typename U::storage* const* rows, int64_t count,
                           int64_t stride_channel, int64_t height, int64_t channels, int64_t pitch,
                           float* dst) {
    const int64_t units = whole_tiles((channels + U::E - 1) / U::E);
    for (int64_t r = 0; r < height; ++r)
        for (int64_t u = 0; u < units; u += S::W)
            S::store(dst + r * pitch + u,
                     r < count ? row_units<S, U>(rows[r], stride_channel, u, channels)
                               : typename S::vf{});
}

/// W units of rows[0] and rows[1], of channels from `first` on; null rows, and channels past the last,
/// are 0.
template <class S, class U>
inline typename S::vf paired_channels(const typename U::storage* const* rows,
                                      int64_t stride_channel, int64_t first, int64_t channels) {
    using storage = typename U::storage;
    const int64_t left = channels - first;
    if (stride_channel == 1 && left >= S::W && rows[0] && rows[1]) return U::from_rows(rows, first);
    storage buffer[U::E][S::W] = {};
    const storage* part[U::E];
    for (int e = 0; e < U::E; ++e) {
        part[e] = buffer[e];
        if (rows[e])
            gather<S>(rows[e] + first * stride_channel, stride_channel,
                      left < S::W ? left : int64_t{S::W}, buffer[e], S::W);
    }
    return U::from_rows(part, 0);
}

/// Transposes a tile of V: dst[channel * pitch + unit of keys], with zeros up to whole tiles.
template <class S, class U>
inline PackedValues pack_tile_columns(const typename U::storage* const* rows, int64_t count,
                                      int64_t stride_channel, int64_t channels, int64_t pitch,
                                      float* dst) {
    constexpr int W = S::W;
    static_assert(W == tile_units && U::E == 2);
    bool left_out = false;
    typename S::vf not_finite{};
    for (int64_t u = 0; u < whole_tiles((count + 1) / 2); u += W)
        for (int64_t c = 0; c < channels; c += W) {
            typename S::vf x[W];
            for (int i = 0; i < W; ++i) {
                const int64_t k = (u + i) * 2;
                const typename U::storage* pair[] = {k < count ? rows[k] : nullptr,
                                                     k + 1 < count ? rows[k + 1] : nullptr};
                x[i] = paired_channels<S, U>(pair, stride_channel, c, channels);
                not_finite += U::times_zero(x[i]);
                x[i] = U::without_extremes(x[i], left_out);
            }
            S::transpose(x);
            for (int i = 0; i < W; ++i) S::store(dst + (c + i) * pitch + u, x[i]);
        }
    bool finite = true;
    for (int i = 0; i < W; ++i) finite &= not_finite[i] == 0;
    return {left_out, finite};
}

/// The four tiles of C, or the first two: Rows tiles of A beside two of B.
template <class Tiles, int Rows>
struct Accumulators {
    static void zero() {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        if constexpr (Rows == 2) {
            Tiles::template zero<2>();
            Tiles::template zero<3>();
        }
    }
    static void load(const float* c, int64_t pitch) {
        Tiles::template load<0>(c, pitch * unit_bytes);
        Tiles::template load<1>(c + tile_units, pitch * unit_bytes);
        if constexpr (Rows == 2) {
            Tiles::template load<2>(c + tile_units * pitch, pitch * unit_bytes);
            Tiles::template load<3>(c + tile_units * pitch + tile_units, pitch * unit_bytes);
        }
    }
    static void store(float* c, int64_t pitch) {
        Tiles::template store<0>(c, pitch * unit_bytes);
        Tiles::template store<1>(c + tile_units, pitch * unit_bytes);
        if constexpr (Rows == 2) {
            Tiles::template store<2>(c + tile_units * pitch, pitch * unit_bytes);
            Tiles::template store<3>(c + tile_units * pitch + tile_units, pitch * unit_bytes);
        }
    }
    static void step(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch) {
        Tiles::template load<6>(b, b_pitch * unit_bytes);
        Tiles::template load<4>(a, a_pitch * unit_bytes);
        Tiles::template multiply_add_bf16<0, 4, 6>();
        Tiles::template load<7>(b + tile_units, b_pitch * unit_bytes);
        Tiles::template multiply_add_bf16<1, 4, 7>();
        if constexpr (Rows == 2) {
            Tiles::template load<5>(a + tile_units * a_pitch, a_pitch * unit_bytes);
            Tiles::template multiply_add_bf16<2, 5, 6>();
            Tiles::template multiply_add_bf16<3, 5, 7>();
        }
    }
};

/// Products q.k of keys [first, last), multiples of 32, and the N queries of a panel: scores[key][N].
template <class S>
inline void tile_scores(const float* key, const float* query, int64_t depth, int64_t first,
                        int64_t last, float* scores) {
    constexpr int64_t N = S::nv * S::W;
    using C = Accumulators<typename S::Tiles, 2>;
    static_assert(N == 2 * tile_units && S::mr == 2 * tile_units);
    for (int64_t k = first; k < last; k += S::mr) {
        C::zero();
        for (int64_t u = 0; u < depth; u += tile_units)
            C::step(key + k * depth + u, depth, query + u * N, N);
        C::store(scores + k * N, N);
    }
}

/// finish_scores() of keys [first, last), whose products are in `scores`. Groups inside
/// [seen_begin, seen_end) are seen by every row.
template <class S, bool Plain>
inline void finish_tile_scores(const Scoring& scoring, int64_t first, int64_t last,
                               int64_t seen_begin, int64_t seen_end, int32_t diagonal,
                               const float* bias, float* scores, Panel<S>& panel) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W, MR = 8;
    constexpr int64_t N = NV * W;
    for (int64_t k = first; k < last; k += MR) {
        vf acc[MR][NV];
        for (int m = 0; m < MR; ++m)
            for (int n = 0; n < NV; ++n) acc[m][n] = S::load(scores + (k + m) * N + n * W);
        const float* own = bias ? bias + k * N : nullptr;
        if (k < seen_begin || k + MR > seen_end) {
            finish_scores<S, true, Plain>(acc, scoring, static_cast<int32_t>(k), diagonal, own,
                                          scores + k * N, panel);
        } else if constexpr (Plain) {
            for (int n = 0; n < NV; ++n) {
                vf maximum = S::load(panel.tile_maximum + n * W);
                for (int m = 0; m < MR; ++m) maximum = S::max(acc[m][n], maximum);
                S::store(panel.tile_maximum + n * W, maximum);
            }
        } else {
            finish_scores<S, false, Plain>(acc, scoring, static_cast<int32_t>(k), diagonal, own,
                                           scores + k * N, panel);
        }
    }
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

/// O^T += V^T P^T over the units [first, last) of keys, multiples of 16. O is rounded once for 32 keys,
/// not once per key, so that 2**24 keys of equal weight still count.
template <class S, int Rows>
inline void tile_sums(const float* value, int64_t pitch, const float* p, int64_t first,
                      int64_t last, bool fresh, float* o) {
    constexpr int64_t N = S::nv * S::W;
    using C = Accumulators<typename S::Tiles, Rows>;
    if (fresh)
        C::zero();
    else
        C::load(o, N);
    for (int64_t u = first; u < last; u += tile_units) C::step(value + u, pitch, p + u * N, N);
    C::store(o, N);
}

/// The same for all channels of a panel, after rescale().
template <class S>
inline void accumulate_tiles(const float* value, int64_t pitch, const float* p, int64_t first,
                             int64_t last, int64_t channels, const Panel<S>& panel, float* o) {
    constexpr int64_t N = S::nv * S::W, two = 2 * tile_units;
    if (!panel.fresh) rescale<S>(panel, channels, o);
    int64_t c = 0;
    for (; c + two <= channels; c += two)
        tile_sums<S, 2>(value + c * pitch, pitch, p, first, last, panel.fresh, o + c * N);
    if (c < channels)
        tile_sums<S, 1>(value + c * pitch, pitch, p, first, last, panel.fresh, o + c * N);
}

/// Adds the values that pack_tile_columns() left out. Hidden keys, whose probability is negative,
/// add nothing.
template <class S, class U>
inline void accumulate_left_out(const typename U::storage* const* rows, int64_t stride_channel,
                                int64_t keys, int64_t channels, const float* p, int64_t first,
                                int64_t last, float* o) {
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int NV = S::nv, W = S::W;
    for (int64_t k = first; k < last && k < keys; ++k)
        for (int64_t c = 0; c < channels; ++c) {
            const auto value = rows[k][c * stride_channel];
            if (!U::is_left_out(value)) continue;
            const vf v = (vf)(vu{} + (uint32_t{value} << 16));
            for (int n = 0; n < NV; ++n) {
                const vu pair = (vu)S::load(p + (k / U::E * NV + n) * W);
                const vf own = (vf)(k % U::E ? pair & 0xffff0000u : pair << 16);
                float* at = o + (c * NV + n) * W;
                const vf sum = S::load(at);
                S::store(at, ((vi)own < 0) ? sum : sum + v * own);
            }
        }
}

}  // namespace
}  // namespace umfa::cpu
