// From one tile of keys to scores, probabilities and their sums with the values, for a few rows of queries.
#pragma once

#include "cpu/isa/bias.h"
#include "cpu/isa/decode_tile.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/softmax.h"

namespace umfa::cpu {
namespace {

/// Lane i becomes the sum of the lanes of x[i], for Count = W. For fewer, their sums down to Distance.
template <class S, int Count, int Distance = Count / 2>
UMFA_INLINE typename S::vf sum_each(typename S::vf* x) {
    if constexpr (Count == 1) {
        return x[0];
    } else {
        for (int i = 0; i < Count / 2; ++i)
            x[i] = S::template merge<Distance>(x[i], x[i + Count / 2]);
        return sum_each<S, Count / 2, Distance / 2>(x);
    }
}

/// All lanes become the largest; no lane is NaN.
template <class S, int Distance>
UMFA_INLINE typename S::vf highest_lane(typename S::vf x) {
    if constexpr (Distance == 0)
        return x;
    else
        return highest_lane<S, Distance / 2>(S::max(x, S::template swap<Distance>(x)));
}

/// q.k of R rows and `keys` keys of a tile; with `add`, added to the scores of an earlier call. `query`:
/// vector i of row r at [i * R + r].
template <class S, int R, class Tile>
__attribute__((noinline)) void decode_scores(const Tile& tile, int64_t keys, bool ahead,
                                             const float* query, int64_t depth, bool add,
                                             float* scores) {
    using U = typename Tile::Units;
    using vf = typename S::vf;
    constexpr int W = S::W;
    // Keys at a time: each vector of the query is read once for them.
    constexpr int K = S::mr * S::nv < 24 ? 2 : 4, step = W / K;
    const int64_t whole = tile.whole_vectors(), all = depth / W;
    for (int64_t k0 = 0; k0 < keys; k0 += W) {
        vf sum[R][step];
        for (int j = 0; j < step; ++j) {
            typename Tile::Row row[K];
            for (int m = 0; m < K; ++m) {
                const int64_t key = k0 + j + m * step, k = key < keys ? key : keys - 1;
                row[m] = tile.row(k);
                if (ahead) tile.prefetch(k, 0, tile.channels);
            }
            vf acc[R][K];
            for (int r = 0; r < R; ++r)
                for (int m = 0; m < K; ++m) acc[r][m] = vf{};
            const float* q = query;
            const auto add_products = [&](const vf(&x)[K]) {
                for (int r = 0; r < R; ++r, q += W) {
                    const vf own = S::load(q);
                    for (int m = 0; m < K; ++m) acc[r][m] = U::fma(acc[r][m], own, x[m]);
                }
            };
            vf x[K];
            for (int64_t i = 0; i < whole; ++i) {
                for (int m = 0; m < K; ++m) x[m] = tile.whole(row[m], i);
                add_products(x);
            }
            for (int64_t i = whole; i < all; ++i) {
                for (int m = 0; m < K; ++m) x[m] = tile.part(row[m], i);
                add_products(x);
            }
            for (int r = 0; r < R; ++r) sum[r][j] = sum_each<S, K, W / 2>(acc[r]);
        }
        for (int r = 0; r < R; ++r) {
            float* to = scores + r * decode_tile + k0;
            const vf total = sum_each<S, step>(sum[r]);
            S::store(to, add ? S::load(to) + total : total);
        }
    }
}

/// The scores of one row as they are compared: scaled unless Plain, -inf for hidden keys. Each lane of
/// the result is the largest of its own and `highest`. `lost` is set where a score is -inf of itself.
/// `diagonal`: the row's own key, relative to the tile. `mask`: the row's elements for the tile's
/// keys, if it has a mask.
template <class S, bool Plain>
inline typename S::vf decode_maximum(const Scoring& scoring, VisibleRow visible, int64_t keys,
                                     int32_t diagonal, const Mask& mask_of, const char* mask,
                                     float* scores, float highest, typename S::vi& lost) {
    using L = Lanes<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int W = S::W;
    constexpr float infinity = __builtin_inff();
    vi lane;
    for (int w = 0; w < W; ++w) lane[w] = w;
    vf most = S::splat(highest);
    for (int64_t k = 0; k < keys; k += W) {
        const vi key = lane + static_cast<int32_t>(k);
        vf s = S::load(scores + k);
        if constexpr (!Plain) {
            s *= scoring.scale;
            if (scoring.softcap != 0) s = scoring.softcap * L::tanh(s);
            if (scoring.slope != 0)
                s -= scoring.slope * (vf)((vu)S::to_float(diagonal - key) & 0x7fffffffu);
            if (mask) {  // -inf hides a key, whatever its score
                const vf b = mask_values<S>(
                    mask_of.element, mask + k * mask_of.stride_key * size_of(mask_of.element),
                    mask_of.stride_key, keys - k);
                s = b == -infinity ? b : s + b;
            }
        }
        lost |= s == -infinity;
        s = sees(visible, key) ? s : S::splat(-infinity);
        S::store(scores + k, s);
        most = S::max(s, most);
    }
    return most;
}

/// Scores of one row -> probabilities, in place; keys with a score of -inf get -0. `now`: the largest so
/// far, and `maximum` the one before this tile. Returns the factor for O so far.
template <class S, bool Plain>
inline float decode_softmax(const Scoring& scoring, int64_t keys, float now, float* scores,
                            float& maximum, float* sum) {
    using vf = typename S::vf;
    constexpr float infinity = __builtin_inff();
    const float pivot = now == -infinity ? 0.f : now;
    vf total{};
    for (int64_t k = 0; k < keys; k += S::W) {
        const vf s = S::load(scores + k);
        vf p = exponential<S, Plain>(scoring, s - pivot);
        p = s == -infinity ? S::splat(-0.f) : p;
        S::store(scores + k, p);
        total += p;
    }
    const float alpha = maximum == -infinity ? 0.f
                        : maximum == now
                            ? 1.f
                            : exponential<S, Plain>(scoring, S::splat(maximum - pivot))[0];
    maximum = now;
    S::store(sum, S::load(sum) * alpha + total);
    return alpha;
}

/// O = O * alpha + P V for R rows and keys [first, last); the sum over the tile is added to O once.
/// Guarded: skips hidden keys, whose values may be NaN.
template <class S, int R, bool Guarded, class Tile>
__attribute__((noinline)) void decode_values(const Tile& tile, int64_t first, int64_t last,
                                             bool ahead, int64_t channels, const float* p,
                                             const float* alpha, float* out, int64_t pitch) {
    static_assert(!Guarded || R == 1, "rows see different keys");
    using vf = typename S::vf;
    constexpr int W = S::W, V = 4;
    const auto hidden = [&](int64_t k) { return Guarded && __builtin_signbit(p[k]); };
    const int64_t whole = tile.whole_vectors();
    int64_t i = 0;
    for (; i + V <= whole; i += V) {
        vf acc[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = vf{};
        for (int64_t k = first; k < last; ++k) {
            if (hidden(k)) continue;
            const auto row = tile.row(k);
            if (ahead) tile.prefetch(k, i * W, V * W);
            vf x[V];
            for (int v = 0; v < V; v += 2) tile.two(row, i + v, x[v], x[v + 1]);
            for (int r = 0; r < R; ++r) {
                const vf pr = S::splat_bits(p + r * decode_tile + k);
                for (int v = 0; v < V; ++v) acc[r][v] = S::fma(acc[r][v], pr, x[v]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                if (v % 2 == 0) Tile::in_order(acc[r][v], acc[r][v + 1]);
                float* to = out + r * pitch + (i + v) * W;
                S::store(to, S::fma(acc[r][v], S::load(to), S::splat(alpha[r])));
            }
    }
    for (; i * W < channels; ++i) {
        vf acc[R];
        for (int r = 0; r < R; ++r) acc[r] = vf{};
        for (int64_t k = first; k < last; ++k) {
            if (hidden(k)) continue;
            const vf x = tile.part(tile.row(k), i);
            for (int r = 0; r < R; ++r)
                acc[r] = S::fma(acc[r], S::splat_bits(p + r * decode_tile + k), x);
        }
        for (int r = 0; r < R; ++r) {
            float* to = out + r * pitch + i * W;
            S::store(to, S::fma(acc[r], S::load(to), S::splat(alpha[r])));
        }
    }
}

template <class S, class Tile>
inline bool rows_finite(const Tile& tile, int64_t first, int64_t last, int64_t channels) {
    typename S::vf sum{};  // x * 0 is 0 for finite x, else NaN
    for (int64_t k = first; k < last; ++k) {
        const auto row = tile.row(k);
        for (int64_t i = 0; i * S::W < channels; ++i) sum += tile.part(row, i) * 0.f;
    }
    for (int i = 0; i < S::W; ++i)
        if (sum[i] != 0) return false;
    return true;
}

}  // namespace
}  // namespace umfa::cpu
