// Forward attention for few queries over many keys (decoding): the queries of all heads that share
// a key head go over K and V together, so each byte of the cache is read once. Channels lie along
// the vector lanes, K and V are read where they are, and the keys are cut into parts that run on
// their own and are merged (flash-decoding, Dao et al. 2023).
//
// Parts have the same length on every machine, and rows never mix: the bits of a row do not depend
// on threads or on other rows.
#pragma once

#include "core/constants.h"
#include "cpu/isa/bias.h"
#include "cpu/isa/codes.h"
#include "cpu/isa/dropout.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/rotary.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/softmax.h"

namespace umfa::cpu {
namespace {

constexpr int64_t decode_tile = 32;  // keys per softmax step
constexpr int decode_rows = 4;       // rows at a time: 16 accumulators with 4 vectors of channels

/// One row: what it is, and its running maximum.
struct DecodeRow {
    Scoring scoring;
    float maximum;
    int64_t head, query;
};
constexpr int64_t decode_row_floats_of_state = sizeof(DecodeRow) / 4;

/// Where the pieces of one key head's scratch begin, in floats; the scores' tile is shared by all.
template <class S, class U>
struct DecodeScratch {
    int64_t numbers;          // where those of a quantised tile begin; before it, what comes next
    int64_t shared;           // the scores of a tile, its keys where they are rotated, its numbers
    int64_t rows;             // queries of the heads that share the key head
    int64_t depth, depth_qv;  // units of a row of Q and QV, whole vectors
    int64_t channels;         // of a row of O, likewise
    int64_t query, qv, out, sum, state, size;

    DecodeScratch(const ForwardArgs& args, int64_t seqlen_q) {
        constexpr int64_t W = S::W;
        numbers = decode_rows * decode_tile + (args.rotary.keys ? decode_tile * args.head_dim : 0);
        shared = numbers + decode_tile * number_channels(args);
        rows = args.group * seqlen_q;
        const auto units = [](int64_t elements) {
            return ((elements + U::E - 1) / U::E + W - 1) / W * W;
        };
        depth = units(args.head_dim);
        depth_qv = args.qv.data ? units(args.head_dim_v) : 0;
        channels = (args.head_dim_v + W - 1) / W * W;
        query = 0;                    // [row][depth]
        qv = query + rows * depth;    // [row][depth_qv]
        out = qv + rows * depth_qv;   // [row][channels]
        sum = out + rows * channels;  // [row][W], to be added up
        state = sum + rows * W;       // [row]: DecodeRow
        size = state + (rows * decode_row_floats_of_state + 15) / 16 * 16;
    }
};

/// Lane i becomes the sum of the lanes of x[i].
template <class S>
inline typename S::vf sum_each(typename S::vf (&x)[S::W]) {
    for (int half = S::W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            x[i] = S::interleave_low(x[i], x[i + half]) + S::interleave_high(x[i], x[i + half]);
    return x[0];
}

/// The rows of a tile's keys: where they are, and where those of the next tile are.
struct TileRows {
    const void *now[decode_tile], *next[decode_tile];  // next: null past the last
};

struct DecodeTile {
    int64_t first, keys;  // of all the keys
    TileRows key, value;
    Rows key_layout;  // of args.key, or of its rotated rows
};

/// q.k of R rows and `keys` keys of a tile; with `add`, added to the scores of an earlier call.
template <class S, class U, int R>
__attribute__((noinline)) void decode_scores(const TileRows& rows, const Rows& layout, int64_t keys,
                                             bool ahead, int64_t channels, const float* query,
                                             int64_t depth, bool add, float* scores) {
    using vf = typename S::vf;
    using storage = typename U::storage;
    constexpr int W = S::W;
    const int64_t whole = layout.stride_channel == 1 ? channels / (W * U::E) * W : 0;
    for (int64_t k0 = 0; k0 < keys; k0 += W) {
        vf sum[R][W];
        for (int j = 0; j < W; ++j) {
            const int64_t k = k0 + j < keys ? k0 + j : keys - 1;
            const storage* row = static_cast<const storage*>(rows.now[k]);
            if (ahead && rows.next[k])
                prefetch_row(static_cast<const storage*>(rows.next[k]), layout, channels);
            vf acc[R];
            for (int r = 0; r < R; ++r) acc[r] = vf{};
            for (int64_t u = 0; u < whole; u += W) {
                const vf x = U::from_row(row + u * U::E);
                for (int r = 0; r < R; ++r)
                    acc[r] = U::fma(acc[r], S::load(query + r * depth + u), x);
            }
            for (int64_t u = whole; u < depth; u += W) {
                const vf x = row_units<S, U>(row, layout.stride_channel, u, channels);
                for (int r = 0; r < R; ++r)
                    acc[r] = U::fma(acc[r], S::load(query + r * depth + u), x);
            }
            for (int r = 0; r < R; ++r) sum[r][j] = acc[r];
        }
        for (int r = 0; r < R; ++r) {
            float* to = scores + r * decode_tile + k0;
            const vf total = sum_each<S>(sum[r]);
            S::store(to, add ? S::load(to) + total : total);
        }
    }
}

/// Scores of one row -> probabilities, in place; hidden keys, and those with a score of -inf, get
/// -0. `hides` is set if there may be one of the latter. Returns the factor for O so far.
/// `diagonal`: the row's own key, relative to the tile. `mask`: the row's elements for the tile's
/// keys, if it has a mask.
template <class S, bool Plain>
inline float decode_softmax(const Scoring& scoring, VisibleRow visible, int64_t keys,
                            int32_t diagonal, const Mask& mask_of, const char* mask, float* scores,
                            float& maximum, float* sum, bool& hides) {
    using L = Lanes<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int W = S::W;
    constexpr float infinity = __builtin_inff();
    vi lane;
    for (int w = 0; w < W; ++w) lane[w] = w;
    vf highest = S::splat(maximum);
    vi lost{};
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
        highest = S::max(s, highest);
    }
    hides |= S::any(lost);
    float lanes[W], now = maximum;
    S::store(lanes, highest);
    for (int i = 0; i < W; ++i) now = lanes[i] > now ? lanes[i] : now;
    const float pivot = now == -infinity ? 0.f : now;
    vf total{};
    for (int64_t k = 0; k < keys; k += W) {
        const vf s = S::load(scores + k);
        vf p = exponential<S, Plain>(scoring, s - pivot);
        p = s == -infinity ? S::splat(-0.f) : p;
        S::store(scores + k, p);
        total += p;
    }
    const float alpha =
        maximum == -infinity ? 0.f : exponential<S, Plain>(scoring, S::splat(maximum - pivot))[0];
    maximum = now;
    S::store(sum, S::load(sum) * alpha + total);
    return alpha;
}

/// O = O * alpha + P V for R rows and keys [first, last); the sum over the tile is added to O once.
/// Guarded: skips hidden keys, whose values may be NaN.
template <class S, class T, int R, bool Guarded>
__attribute__((noinline)) void decode_values(const TileRows& rows, const Rows& layout,
                                             int64_t first, int64_t last, bool ahead,
                                             int64_t channels, const float* p, const float* alpha,
                                             float* out, int64_t pitch) {
    static_assert(!Guarded || R == 1, "rows see different keys");
    using vf = typename S::vf;
    using storage = typename T::storage;
    constexpr int W = S::W, V = 4;
    const auto hidden = [&](int64_t k) { return Guarded && __builtin_signbit(p[k]); };
    int64_t c0 = 0;
    if (layout.stride_channel == 1)
        for (; c0 + V * W <= channels; c0 += V * W) {
            vf acc[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) acc[r][v] = vf{};
            for (int64_t k = first; k < last; ++k) {
                if (hidden(k)) continue;
                const storage* row = static_cast<const storage*>(rows.now[k]) + c0;
                if (ahead && rows.next[k])
                    prefetch_row(static_cast<const storage*>(rows.next[k]) + c0, layout, V * W);
                vf x[V];
                for (int v = 0; v < V; v += 2) T::template load_two<S>(row + v * W, x[v], x[v + 1]);
                for (int r = 0; r < R; ++r) {
                    const vf pr = S::splat_bits(p + r * decode_tile + k);
                    for (int v = 0; v < V; ++v) acc[r][v] = S::fma(acc[r][v], pr, x[v]);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    if (v % 2 == 0) T::template in_order<S>(acc[r][v], acc[r][v + 1]);
                    float* to = out + r * pitch + c0 + v * W;
                    S::store(to, S::fma(acc[r][v], S::load(to), S::splat(alpha[r])));
                }
        }
    for (; c0 < channels; c0 += W) {
        vf acc[R];
        for (int r = 0; r < R; ++r) acc[r] = vf{};
        for (int64_t k = first; k < last; ++k) {
            if (hidden(k)) continue;
            const vf x = row_units<S, FloatUnits<S, T>>(static_cast<const storage*>(rows.now[k]),
                                                        layout.stride_channel, c0, channels);
            for (int r = 0; r < R; ++r)
                acc[r] = S::fma(acc[r], S::splat_bits(p + r * decode_tile + k), x);
        }
        for (int r = 0; r < R; ++r) {
            float* to = out + r * pitch + c0;
            S::store(to, S::fma(acc[r], S::load(to), S::splat(alpha[r])));
        }
    }
}

template <class S, class T>
inline bool rows_finite(const TileRows& rows, const Rows& layout, int64_t first, int64_t last,
                        int64_t channels) {
    typename S::vf sum{};  // x * 0 is 0 for finite x, else NaN
    for (int64_t k = first; k < last; ++k)
        for (int64_t c = 0; c < channels; c += S::W)
            sum +=
                row_units<S, FloatUnits<S, T>>(static_cast<const typename T::storage*>(rows.now[k]),
                                               layout.stride_channel, c, channels) *
                0.f;
    for (int i = 0; i < S::W; ++i)
        if (sum[i] != 0) return false;
    return true;
}

/// O / sum of one row, and its LSE. A row that saw no key: 0, and LSE -inf.
template <class S, class U>
inline void write_row(const ForwardArgs& args, int64_t batch, int64_t head, int64_t row,
                      const float* o, float maximum, float sum) {
    constexpr int W = S::W;
    const Scoring scoring = scoring_of(args, batch, head);
    sum = divisor_of(args, scoring, head, maximum, sum);
    const float divisor = sum * args.dropout.kept;
    with_units<S, U>(args.types.out, [&](auto units) {
        using T = typename decltype(units)::type;
        using storage = typename T::storage;
        storage* to = reinterpret_cast<storage*>(
            query_row<typename U::storage>(args.out, args.sequences[batch], head, row));
        for (int64_t c = 0; c < args.head_dim_v; c += W) {
            storage buffer[W];
            T::template store<S>(buffer, sum == 0 ? typename S::vf{} : S::load(o + c) / divisor);
            const int64_t left = args.head_dim_v - c, count = left < W ? left : int64_t{W};
            if (args.out.stride_channel == 1)
                S::copy(buffer, count, to + c);
            else
                for (int64_t i = 0; i < count; ++i)
                    to[(c + i) * args.out.stride_channel] = buffer[i];
        }
    });
    store_lse(args, scoring, batch, head, row, maximum, sum);
}

/// The queries of one key head, and their state between tiles.
template <class S, class U>
struct DecodeHead {
    using storage = typename U::storage;

    const ForwardArgs& args;
    const Sequence& sequence;
    const DecodeScratch<S, U>& at;
    int64_t batch, head_kv;
    float *memory, *scores;

    DecodeRow* rows_state() const { return reinterpret_cast<DecodeRow*>(memory + at.state); }

    /// Copies Q, rotated with rotary on, and starts each row.
    void load_queries() {
        constexpr int W = S::W;
        DecodeRow* state = rows_state();
        for (int64_t r = 0; r < at.rows; ++r) {
            const int64_t head = head_kv * args.group + r / sequence.seqlen_q;
            const int64_t query = r % sequence.seqlen_q;
            state[r] = {scoring_of(args, batch, head), -__builtin_inff(), head, query};
            const storage* row = query_row<const storage>(args.query, sequence, head, query);
            int64_t stride = args.query.stride_channel;
            alignas(float) storage rotated[max_head_dim * (U::any ? sizeof(float) : 1)];
            if (args.rotary.element != ElementType::none) {
                rotate_row_of<S, U>(args.types.query, args.rotary, row, stride, args.head_dim,
                                    position_of(args, sequence, query), rotated);
                row = rotated;
                stride = 1;
            }
            load_units(row, stride, args.head_dim, at.depth, memory + at.query + r * at.depth);
            if (args.qv.data)
                load_units(query_row<const storage>(args.qv, sequence, head, query),
                           args.qv.stride_channel, args.head_dim_v, at.depth_qv,
                           memory + at.qv + r * at.depth_qv);
            for (int64_t c = 0; c < at.channels; ++c) memory[at.out + r * at.channels + c] = 0;
            for (int i = 0; i < W; ++i) memory[at.sum + r * W + i] = 0;
        }
    }

    /// A row of Q or QV as `depth` units.
    void load_units(const storage* row, int64_t stride, int64_t channels, int64_t depth,
                    float* to) const {
        with_units<S, U>(args.types.query, [&](auto units) {
            using Own = decltype(units);
            const auto* from = reinterpret_cast<const typename Own::storage*>(row);
            for (int64_t u = 0; u < depth; u += S::W)
                S::store(to + u, row_units<S, Own>(from, stride, u, channels));
        });
    }

    /// Rows of the tile [k0, k0 + keys), and of the next one: `ahead` of its keys are read.
    void find(const Rows& where, int64_t k0, int64_t keys, int64_t next, int64_t ahead,
              TileRows& rows) const {
        if (!sequence.pages) {
            const storage* row = key_row<const storage>(where, sequence, 1, head_kv, k0);
            const int64_t distance = (next - k0) * where.stride_row;
            for (int64_t k = 0; k < keys; ++k, row += where.stride_row) {
                rows.now[k] = row;
                rows.next[k] = k < ahead ? row + distance : nullptr;
            }
            return;
        }
        for (int64_t k = 0; k < keys; ++k) {
            rows.now[k] = key_row<const storage>(where, sequence, args.page_size, head_kv, k0 + k);
            rows.next[k] = k < ahead ? key_row<const storage>(where, sequence, args.page_size,
                                                              head_kv, next + k)
                                     : nullptr;
        }
    }

    /// Adds the keys [first, first + keys), a tile or the rest of one. The next tile begins at
    /// `next`, and `ahead` of its keys are read.
    void process_tile(int64_t first, int64_t keys, int64_t next, int64_t ahead) {
        DecodeTile tile;
        tile.first = first;
        tile.keys = keys;
        tile.key_layout = args.key;
        find(args.key, first, keys, next, ahead, tile.key);
        find(args.value, first, keys, next, ahead, tile.value);
        if constexpr (U::any)
            numbers_of_keys(args, sequence, head_kv, first, keys, scores + at.numbers, tile.key.now,
                            tile.value.now);
        if (args.rotary.keys) rotate_keys(tile);
        for (int64_t r0 = 0; r0 < at.rows; r0 += decode_rows) switch (at.rows - r0) {
                case 1: process_rows<1>(r0, tile); break;
                case 2: process_rows<2>(r0, tile); break;
                case 3: process_rows<3>(r0, tile); break;
                default: process_rows<decode_rows>(r0, tile);
            }
    }

    void rotate_keys(DecodeTile& tile) {
        storage* rotated = reinterpret_cast<storage*>(scores + decode_rows * decode_tile);
        const int64_t size = extent<U>(args.types.key, args.head_dim);
        for (int64_t k = 0; k < tile.keys; ++k, rotated += size) {
            rotate_row_of<S, U>(
                args.types.key, args.rotary, static_cast<const storage*>(tile.key.now[k]),
                tile.key_layout.stride_channel, args.head_dim, tile.first + k, rotated);
            tile.key.now[k] = rotated;
        }
        tile.key_layout.stride_channel = 1;
    }

    template <int R>
    void process_rows(int64_t r0, const DecodeTile& tile) {
        float alpha[R];
        score_tile<R>(r0, tile);
        const bool hides = softmax_tile<R>(r0, tile, alpha);
        accumulate_tile<R>(r0, tile, alpha, hides);
    }

    /// Whether the rows from r0 on prefetch the next tile: the first ones do.
    static bool prefetches(int64_t r0) { return r0 == 0; }

    template <int R>
    void score_tile(int64_t r0, const DecodeTile& tile) {
        with_units<S, U>(args.types.key, [&](auto units) {
            decode_scores<S, decltype(units), R>(
                tile.key, tile.key_layout, tile.keys, prefetches(r0), args.head_dim,
                memory + at.query + r0 * at.depth, at.depth, false, scores);
        });
        if (!args.qv.data) return;
        with_units<S, U>(args.types.value, [&](auto units) {
            // accumulate_tile() prefetches the next tile's values
            decode_scores<S, decltype(units), R>(tile.value, args.value, tile.keys, false,
                                                 args.head_dim_v, memory + at.qv + r0 * at.depth_qv,
                                                 at.depth_qv, true, scores);
        });
    }

    /// Scores -> probabilities, maxima and sums; then dropout. `alpha`: the factor for each row's
    /// O. Returns whether some row may have a score of -inf for a key that it sees.
    template <int R>
    bool softmax_tile(int64_t r0, const DecodeTile& tile, float (&alpha)[R]) {
        bool hides = false;
        for (int r = 0; r < R; ++r) {
            DecodeRow& row = rows_state()[r0 + r];
            float* own = scores + r * decode_tile;
            const char* mask = args.mask.element == ElementType::none
                                   ? nullptr
                                   : mask_at(args.mask, batch, row.head, row.query, tile.first);
            alpha[r] =
                (row.scoring.plain
                     ? decode_softmax<S, true>
                     : decode_softmax<S, false>)(row.scoring,
                                                 visible_row(sequence.visible, row.query,
                                                             tile.first, tile.keys),
                                                 tile.keys,
                                                 diagonal_of(sequence, row.query, tile.first),
                                                 args.mask, mask, own, row.maximum,
                                                 memory + at.sum + (r0 + r) * S::W, hides);
            if (args.dropout.threshold)
                drop_keys<S>(args.dropout, batch, row.head, row.query, tile.first, tile.keys, own);
        }
        return hides;
    }

    /// O = O * alpha + P V. `hides`: a key that all rows see may have the weight of a hidden one.
    template <int R>
    void accumulate_tile(int64_t r0, const DecodeTile& tile, const float (&alpha)[R], bool hides) {
        const int64_t Dv = args.head_dim_v;
        const DecodeRow* row = rows_state() + r0;
        int64_t first = row[0].query, last = first;
        for (int r = 1; r < R; ++r) {
            first = row[r].query < first ? row[r].query : first;
            last = row[r].query > last ? row[r].query : last;
        }
        const KeyRange some = seen_by_some(sequence.visible, first, last, tile.first, tile.keys);
        const KeyRange all = seen_by_all(sequence.visible, first, last, tile.first, tile.keys);
        if (some.begin >= some.end) return;
        hides = hides || args.mask.element != ElementType::none || some.begin < all.begin ||
                some.end > all.end;
        float* out = memory + at.out + r0 * at.channels;
        with_units<S, U>(args.types.value, [&](auto units) {
            using T = typename decltype(units)::type;
            if (!hides || rows_finite<S, T>(tile.value, args.value, some.begin, some.end, Dv))
                decode_values<S, T, R, false>(tile.value, args.value, some.begin, some.end,
                                              prefetches(r0), Dv, scores, alpha, out, at.channels);
            else
                for (int r = 0; r < R; ++r)
                    decode_values<S, T, 1, true>(tile.value, args.value, some.begin, some.end,
                                                 false, Dv, scores + r * decode_tile, alpha + r,
                                                 out + r * at.channels, at.channels);
        });
    }

    /// Writes the result, or, when `part` is not null, each row's O undivided, its maximum and its
    /// sum there.
    void store_rows(float* part) const {
        for (int64_t r = 0; r < at.rows; ++r) {
            const float *o = memory + at.out + r * at.channels, *sum = memory + at.sum + r * S::W;
            const DecodeRow& state = rows_state()[r];
            float total = 0;
            for (int i = 0; i < S::W; ++i) total += sum[i];
            if (!part) {
                write_row<S, U>(args, batch, state.head, state.query, o, state.maximum, total);
                continue;
            }
            float* to = part + r * (at.channels + 2);
            for (int64_t c = 0; c < at.channels; ++c) to[c] = o[c];
            to[at.channels] = state.maximum;
            to[at.channels + 1] = total;
        }
    }
};

/// Heads are taken together, tile by tile: where they lie side by side in memory, going over all
/// keys of one of them would touch every page of the cache for each head (on the 2-core machine,
/// with 8 heads and pages of 4 KiB, 5 GB/s per core instead of 12).
template <class S, class U>
void decode_keys(const ForwardArgs& args, int64_t batch, int64_t head_begin, int64_t head_end,
                 int64_t key_begin, int64_t key_end, float* memory, float* part) {
    const Sequence& sequence = args.sequences[batch];
    const DecodeScratch<S, U> at(args, sequence.seqlen_q);
    const int64_t heads = head_end - head_begin;
    const auto head = [&](int64_t h) {
        return DecodeHead<S, U>{
            args, sequence, at, batch, head_begin + h, memory + at.shared + h * at.size, memory};
    };
    for (int64_t h = 0; h < heads; ++h) head(h).load_queries();

    const int64_t last = sequence.seqlen_q - 1;
    const auto tile_from = [&](int64_t from) {
        return next_tile(sequence.visible, int64_t{0}, last, from, decode_tile);
    };
    // How many keys are read of the tile that begins at `from`.
    const auto keys_from = [&](int64_t from) -> int64_t {
        const int64_t left = key_end > from ? key_end - from : 0;
        return seen_by_some(sequence.visible, int64_t{0}, last, from,
                            left < decode_tile ? left : decode_tile)
            .end;
    };
    for (int64_t k0 = tile_from(key_begin), next; k0 < key_end; k0 = next) {
        next = tile_from(k0 + decode_tile);
        const int64_t keys = keys_from(k0), ahead = keys_from(next);
        for (int64_t h = 0; h < heads; ++h) head(h).process_tile(k0, keys, next, ahead);
    }
    const int64_t row_floats = at.rows * (at.channels + 2);
    for (int64_t h = 0; h < heads; ++h) head(h).store_rows(part ? part + h * row_floats : nullptr);
}

/// Merges the parts of one row, in order. `stride`: floats from one part of the row to the next.
template <class S, class U>
void decode_merge(const ForwardArgs& args, int64_t batch, int64_t head, int64_t row,
                  const float* part, int64_t stride, int64_t parts, float* memory) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    constexpr float infinity = __builtin_inff();
    const int64_t channels = (args.head_dim_v + W - 1) / W * W;
    const Scoring scoring = scoring_of(args, batch, head);
    float maximum = -infinity, total = 0;
    for (int64_t s = 0; s < parts; ++s) {
        const float m = part[s * stride + channels];
        maximum = m > maximum ? m : maximum;
    }
    for (int64_t c = 0; c < channels; ++c) memory[c] = 0;
    for (int64_t s = 0; s < parts; ++s) {
        const float* from = part + s * stride;
        const float m = from[channels];
        if (m == -infinity) {
            // No key has weight; NaN propagates.
            total += from[channels + 1];
            continue;
        }
        const vf difference = S::splat(m - maximum);
        const float weight = scoring.plain ? exponential<S, true>(scoring, difference)[0]
                                           : exponential<S, false>(scoring, difference)[0];
        for (int64_t c = 0; c < channels; c += W)
            S::store(memory + c, S::load(memory + c) + S::load(from + c) * weight);
        total += from[channels + 1] * weight;
    }
    write_row<S, U>(args, batch, head, row, memory, maximum, total);
}

template <class S, class U>
int64_t decode_scratch_floats(const ForwardArgs& args, int64_t heads, int64_t seqlen_q) {
    const DecodeScratch<S, U> at(args, seqlen_q);
    return at.shared + heads * at.size;
}

/// Floats that one row of a part takes.
template <class S>
int64_t decode_row_floats(const ForwardArgs& args) {
    return (args.head_dim_v + S::W - 1) / S::W * S::W + 2;
}

}  // namespace
}  // namespace umfa::cpu
