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
#include "cpu/isa/decode_products.h"
#include "cpu/isa/decode_scratch.h"
#include "cpu/isa/decode_tile.h"
#include "cpu/isa/dropout.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/rotary.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/softmax.h"

namespace umfa::cpu {
namespace {

struct DecodeTile {
    int64_t first, keys;  // of all the keys
    TileRows key, value;
    Rows key_layout;  // of args.key, or of its rotated rows
};

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
    const DecodeCodes<S>& codes;
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
            load_units(row, stride, args.head_dim, r, at.depth, memory + at.query);
            if (args.qv.data)
                load_units(query_row<const storage>(args.qv, sequence, head, query),
                           args.qv.stride_channel, args.head_dim_v, r, at.depth_qv, memory + at.qv);
            for (int64_t c = 0; c < at.channels; ++c) memory[at.out + r * at.channels + c] = 0;
            for (int i = 0; i < W; ++i) memory[at.sum + r * W + i] = 0;
        }
    }

    /// Row r of Q or QV as `depth` units. Vectors of rows that are multiplied together follow each other.
    void load_units(const storage* row, int64_t stride, int64_t channels, int64_t r, int64_t depth,
                    float* to) const {
        const int64_t r0 = r - r % decode_rows, left = at.rows - r0;
        const int64_t together = left < decode_rows ? left : int64_t{decode_rows};
        to += r0 * depth + (r - r0) * S::W;
        with_units<S, U>(args.types.query, [&](auto units) {
            using Own = decltype(units);
            const auto* from = reinterpret_cast<const typename Own::storage*>(row);
            for (int64_t u = 0; u < depth; u += S::W)
                S::store(to + u * together, row_units<S, Own>(from, stride, u, channels));
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
        if constexpr (U::any) read_codes(tile);
        if (args.rotary.keys) rotate_keys(tile);
        for (int64_t r0 = 0; r0 < at.rows; r0 += decode_rows) switch (at.rows - r0) {
                case 1: process_rows<1>(r0, tile); break;
                case 2: process_rows<2>(r0, tile); break;
                case 3: process_rows<3>(r0, tile); break;
                default: process_rows<decode_rows>(r0, tile);
            }
    }

    /// Scales of the operands whose codes become numbers in registers, numbers of the others.
    void read_codes(DecodeTile& tile) {
        const auto read = [&](const Codes& own, bool in_registers, const CodeLayout<S>& layout,
                              int64_t channels, float* to, TileRows& rows) {
            if (!own.given) return;
            if (!in_registers)
                return numbers_of_keys<S>(args, own, sequence, head_kv, tile.first, tile.keys,
                                          channels, to, rows.now);
            scales_of_tile<S>(args, own, layout, sequence, head_kv, tile.first, tile.keys, rows,
                              to);
        };
        read(args.key_codes, codes.key, codes.key_layout, args.head_dim, scores + at.numbers,
             tile.key);
        read(args.value_codes, codes.value, codes.value_layout, args.head_dim_v, scores + at.values,
             tile.value);
    }

    /// Calls f with a tile's keys, as units that U multiplies.
    template <class F>
    void with_keys(const DecodeTile& tile, F&& f) const {
        if constexpr (U::any)
            if (codes.key)
                return with_codes(args.key_codes, codes.key_layout, scores + at.numbers, tile.key,
                                  f);
        with_units<S, U>(args.types.key, [&](auto units) {
            f(NumberTile<S, decltype(units)>{tile.key, tile.key_layout, args.head_dim});
        });
    }
    /// Calls f with a tile's values; Floats: as floats, whatever U multiplies.
    template <bool Floats, class F>
    void with_values(const DecodeTile& tile, F&& f) const {
        if constexpr (U::any)
            if (codes.value)
                return with_codes(args.value_codes, codes.value_layout, scores + at.values,
                                  tile.value, f);
        with_units<S, U>(args.types.value, [&](auto units) {
            using Own = decltype(units);
            if constexpr (Floats)
                f(NumberTile<S, FloatUnits<S, typename Own::type>>{tile.value, args.value,
                                                                   args.head_dim_v});
            else
                f(NumberTile<S, Own>{tile.value, args.value, args.head_dim_v});
        });
    }
    template <class F>
    static void with_codes(const Codes& own, const CodeLayout<S>& layout, const float* scales,
                           const TileRows& rows, F&& f) {
        with_coding(own, [&](auto coding) {
            f(CodeTile<S, decltype(coding)>{rows, scales, {layout, decode_tile * layout.blocks}});
        });
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
        with_keys(tile, [&](const auto& keys) {
            decode_scores<S, R>(keys, tile.keys, prefetches(r0), memory + at.query + r0 * at.depth,
                                at.depth, false, scores);
        });
        if (!args.qv.data) return;
        with_values<false>(tile, [&](const auto& values) {
            // accumulate_tile() prefetches the next tile's values
            decode_scores<S, R>(values, tile.keys, false, memory + at.qv + r0 * at.depth_qv,
                                at.depth_qv, true, scores);
        });
    }

    /// Scores -> probabilities, maxima and sums; then dropout. `alpha`: the factor for each row's
    /// O. Returns whether some row may have a score of -inf for a key that it sees.
    template <int R>
    bool softmax_tile(int64_t r0, const DecodeTile& tile, float (&alpha)[R]) {
        typename S::vf most[R];
        typename S::vi lost{};
        DecodeRow* row = rows_state() + r0;
        for (int r = 0; r < R; ++r) {
            const char* mask =
                args.mask.element == ElementType::none
                    ? nullptr
                    : mask_at(args.mask, batch, row[r].head, row[r].query, tile.first);
            most[r] =
                (row[r].scoring.plain
                     ? decode_maximum<S, true>
                     : decode_maximum<S, false>)(row[r].scoring,
                                                 visible_row(sequence.visible, row[r].query,
                                                             tile.first, tile.keys),
                                                 tile.keys,
                                                 diagonal_of(sequence, row[r].query, tile.first),
                                                 args.mask, mask, scores + r * decode_tile,
                                                 row[r].maximum, lost);
        }
        // Row by row, each step would wait for the one before it.
        for (int r = 0; r < R; ++r) most[r] = highest_lane<S, S::W / 2>(most[r]);
        for (int r = 0; r < R; ++r) {
            float* own = scores + r * decode_tile;
            alpha[r] =
                (row[r].scoring.plain
                     ? decode_softmax<S, true>
                     : decode_softmax<S, false>)(row[r].scoring, tile.keys, most[r][0], own,
                                                 row[r].maximum, memory + at.sum + (r0 + r) * S::W);
            if (args.dropout.threshold)
                drop_keys<S>(args.dropout, batch, row[r].head, row[r].query, tile.first, tile.keys,
                             own);
        }
        return S::any(lost);
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
        with_values<true>(tile, [&](const auto& values) {
            if (!hides || rows_finite<S>(values, some.begin, some.end, Dv))
                decode_values<S, R, false>(values, some.begin, some.end, prefetches(r0), Dv, scores,
                                           alpha, out, at.channels);
            else
                for (int r = 0; r < R; ++r)
                    decode_values<S, 1, true>(values, some.begin, some.end, false, Dv,
                                              scores + r * decode_tile, alpha + r,
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
    const DecodeCodes<S> codes(args, at.rows);
    const int64_t heads = head_end - head_begin;
    const auto head = [&](int64_t h) {
        return DecodeHead<S, U>{
            args,  sequence, at, codes, batch, head_begin + h, memory + at.shared + h * at.size,
            memory};
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
