// Forward attention for one block of queries: online softmax over key tiles (Milakov & Gimelshein
// 2018; Dao et al. 2022), in exp2 with log2(e) folded into the scale. forward_block() at the end is
// the algorithm.
//
// Everything is transposed: queries lie along the vector lanes. S^T = K Q^T broadcasts K, and
// O^T += V^T P^T broadcasts V, both from packed panels; the softmax between them needs no shuffle,
// and P^T is already laid out for the second product. A tile of K and V is packed once for all
// panels of the block: heads of a (seqlen, heads, channels) tensor lie so far apart that twelve
// rows in place would share one set of the L1 cache.
//
// Key tiles start at multiples of keys_of_tile whatever the block of queries, and lanes never mix: the
// bits of a row do not depend on block sizes, threads, or the other rows.
//
// S is an instruction set's vectors, with `mr` (keys or channels per micro-tile) and `nv` (vectors
// of queries per panel); U is what the micro-kernels multiply.
#pragma once

#include "cpu/isa/bias.h"
#include "cpu/isa/codes.h"
#include "cpu/isa/dropout.h"
#include "cpu/isa/int8_scores.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/product.h"
#include "cpu/isa/rotary.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/softmax.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

template <class S>
constexpr int64_t panel_floats = (sizeof(Panel<S>) + 63) / 64 * 16;

/// Where the pieces of a task's scratch begin, in floats. Those that vectors are aligned for come
/// first: their sizes are multiples of a panel's lanes.
template <class S, class U>
struct Scratch {
    using Q = typename U::scores;
    static constexpr int64_t N = S::nv * S::W, slack = 64;
    static constexpr int64_t buffers = U::tiles ? 2 : 1;  // of scores and probabilities
    int64_t key_depth, depth, channels;  // units of Q.K; with those of QV.V; padded channels of O
    int64_t value_pitch;
    int64_t panels, scores, probabilities, bias, query, out, key, value, rotated, numbers,
        value_numbers, lanes, key_scales, key_smoothed, value_scales, codes, size;
    int64_t code_pitch;  // of rows of int8 codes

    Scratch(const ForwardArgs& args, int64_t panel_count) {
        key_depth = units_of<Q::E>(args.head_dim);
        depth = key_depth + (args.qv.data ? units_of<Q::E>(args.head_dim_v) : 0);
        channels = U::tiles ? whole_tiles(args.head_dim_v) : padded_rows<S>(args.head_dim_v);
        panels = 0;
        scores = panels + panel_count * panel_floats<S>;
        const bool in_place = U::E == 1 && !U::int8_values;
        probabilities = scores + (in_place ? 0 : buffers * keys_of_tile<U> * N);
        bias = probabilities + buffers * keys_of_tile<U> * N;  // [key][lane], whole vectors of keys
        const bool has_mask = args.mask.element != ElementType::none;
        query = bias + (has_mask ? (keys_of_tile<U> + S::W) * N : 0);  // [panel][depth][N]
        out = query + panel_count * depth * N;                         // [panel][channels][N]
        key = out + panel_count * channels * N;                        // [group][depth][mr]
        value = key + keys_of_tile<U> * depth + slack;
        // An odd number of cache lines: rows of V spread over all sets of the L1 cache. Of the rows of
        // tiles, which are transposed, each has a unit for two keys.
        value_pitch = U::tiles ? keys_of_tile<U> / U::E : ((channels + 15) / 16 | 1) * 16;
        const int64_t value_rows = U::tiles ? padded_rows<S>(channels) : keys_of_tile<U> / U::E;
        rotated = value + value_rows * value_pitch + slack;
        numbers = rotated + (args.rotary.keys ? keys_of_tile<U> * args.head_dim : 0);
        value_numbers = numbers + keys_of_tile<U> * (args.key_codes.given ? args.head_dim : 0);
        lanes = value_numbers + keys_of_tile<U> * (args.value_codes.given ? args.head_dim_v : 0);
        key_scales = lanes + (Q::quantised ? panel_count * 4 * N : 0);
        key_smoothed = key_scales + (Q::quantised ? keys_of_tile<U> + S::mr : 0);
        value_scales = key_smoothed + (Q::quantised ? keys_of_tile<U> + S::mr : 0);
        codes = value_scales + (U::int8_values ? channels + slack : 0);
        code_pitch = (key_depth + 15) / 16 * 16;
        size = codes + (Q::quantised ? keys_of_tile<U> * code_pitch + slack : 0);
    }

    template <int E>
    static int64_t units_of(int64_t elements) {
        const int64_t units = (elements + E - 1) / E;
        return U::tiles ? whole_tiles(units) : units;
    }
};

/// O^T of one panel, MR channels of it: O^T = O^T * alpha + V^T P^T; without the first term where
/// the panel is `fresh`. The sum over the tile starts at zero and is added to O once: O is rounded
/// once per tile, not once per key, so that 2**24 keys of equal weight still count.
template <class S, class U, int MR>
__attribute__((noinline)) void accumulate(const float* value, int64_t pitch, const float* p,
                                          int64_t units, const Panel<S>& panel, float* o) {
    using vf = typename S::vf;
    micro_kernel<S, U, MR>(
        value, pitch, p, units, [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
            for (int n = 0; n < S::nv; ++n)
                for (int m = 0; m < MR; ++m) {
                    float* to = o + (m * S::nv + n) * S::W;
                    vf sum = acc[m][n];
                    if (!panel.fresh)
                        sum = S::fma(sum, S::load(to), S::load(panel.alpha + n * S::W));
                    S::store(to, sum);
                }
        });
}

/// The same where V holds inf or NaN: -0 * NaN must not reach the rows that do not see it. Same
/// operations in the same order, so other rows keep their bits.
template <class S, class U>
inline void accumulate_guarded(int64_t channels, const float* value, int64_t pitch, const float* p,
                               int64_t first_unit, int64_t last_unit, const Panel<S>& panel,
                               float* o) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W;
    for (int n = 0; n < NV; ++n) {
        const vf alpha = S::load(panel.alpha + n * W);
        for (int64_t c = 0; c < channels; ++c) {
            vf acc{};
            for (int64_t k = first_unit; k < last_unit; ++k) {
                const vf own = S::load(p + (k * NV + n) * W);
                acc = U::fma(acc, U::seen(S::splat_bits(value + k * pitch + c), own), own);
            }
            float* at = o + (c * NV + n) * W;
            S::store(at, panel.fresh ? acc : S::fma(acc, S::load(at), alpha));
        }
    }
}

/// Adds the values that were left out when V was packed. Hidden keys, whose probability is -0, add
/// nothing.
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

/// S^T of one panel for MR keys from `first` on.
template <class S, class Q, bool Masked, bool Plain, int MR>
__attribute__((noinline)) void score(const Scoring& scoring, const ScoreScales& scales,
                                     const float* key, const float* query, int64_t depth,
                                     int32_t first, int32_t diagonal, const float* bias,
                                     float* scores, Panel<S>& panel) {
    using vf = typename S::vf;
    const auto begin = [&](int n) __attribute__((always_inline)) {
        if constexpr (Q::quantised) return S::load(scales.lanes + n * S::W);
        return vf{};
    };
    micro_kernel<S, Q, MR>(
        key, MR, query, depth, begin, [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
            if constexpr (Q::quantised) scale_scores<S, Q>(scales, first, acc);
            finish_scores<S, Masked, Plain>(acc, scoring, first, diagonal, bias, scores, panel);
        });
}

/// The same for keys [first, last) of a tile, in groups of mr. Groups inside
/// [seen_begin, seen_end) are seen by every row.
template <class S, class Q, bool Plain>
inline void score_panel(const Scoring& scoring, const ScoreScales& scales, const float* key,
                        const float* query, int64_t depth, int64_t first, int64_t last,
                        int64_t seen_begin, int64_t seen_end, int32_t diagonal, const float* bias,
                        float* scores, Panel<S>& panel) {
    for (int64_t k = first; k < last; k += S::mr)
        with_height<S>(last - k < S::mr ? last - k : S::mr, [&](auto height) {
            constexpr int MR = decltype(height)::value;
            const bool masked = k < seen_begin || k + MR > seen_end;
            (masked ? score<S, Q, true, Plain, MR>
                    : score<S, Q, false, Plain, MR>)(scoring, scales, key + k * depth, query, depth,
                                                     static_cast<int32_t>(k), diagonal,
                                                     bias ? bias + k * S::nv * S::W : nullptr,
                                                     scores + k * S::nv * S::W, panel);
        });
}

/// Prefetches share `part` of `parts` of the rows that a block reads first: its queries and its
/// first tile of keys and values. Without it, waiting for them took a tenth of the time with 512
/// keys. Always inlined: see prefetch_row().
template <class U>
UMFA_INLINE void prefetch_block(const ForwardArgs& args, const Block& block, int64_t part,
                                int64_t parts) {
    using storage = typename U::storage;
    const Sequence& sequence = args.sequences[block.sequence];
    const int64_t channels_q = extent<U>(args.types.query, args.head_dim),
                  channels_qv = extent<U>(args.types.query, args.head_dim_v),
                  channels_k = extent<U>(args.types.key, args.head_dim),
                  channels_v = extent<U>(args.types.value, args.head_dim_v);
    const int64_t rest = sequence.seqlen_q - block.first;
    const int64_t queries = rest < args.block_q ? rest : args.block_q;
    for (int64_t i = queries * part / parts; i < queries * (part + 1) / parts; ++i) {
        prefetch_row(query_row<const storage>(args.query, sequence, block.head, block.first + i),
                     args.query, channels_q);
        if (args.qv.data)
            prefetch_row(query_row<const storage>(args.qv, sequence, block.head, block.first + i),
                         args.qv, channels_qv);
    }
    const int64_t first = next_tile(sequence.visible, block.first, block.first + queries - 1,
                                    int64_t{0}, keys_of_tile<U>);
    const int64_t left = sequence.seqlen_kv - first,
                  keys = left < keys_of_tile<U> ? left : keys_of_tile<U>;
    for (int64_t k = first + keys * part / parts; k < first + keys * (part + 1) / parts; ++k) {
        const int64_t head = block.head / args.group;
        prefetch_row(key_row<const storage>(args.key, sequence, args.page_size, head, k), args.key,
                     channels_k);
        prefetch_row(key_row<const storage>(args.value, sequence, args.page_size, head, k),
                     args.value, channels_v);
    }
}

/// One block of queries while it goes over the keys, a tile at a time.
template <class S, class U>
struct ForwardBlock {
    using storage = typename U::storage;
    using P = typename U::product;
    using Q = typename U::scores;
    using vf = typename S::vf;
    static constexpr int W = S::W, E = U::E;
    static constexpr int64_t N = S::nv * S::W;  // queries of a panel

    const ForwardArgs& args;
    const Sequence& sequence;
    const int64_t batch, head, head_kv;
    const int64_t q_begin, q_end;
    const int64_t panels;
    const Scoring scoring;
    const bool has_mask;
    const Scratch<S, U> at;
    float* const memory;
    Panel<S>* const panel;

    // The tile: where it begins, how many keys it has, and where their rows are.
    int64_t tile = 0, keys = 0;
    const storage *k_rows[keys_of_tile<U>], *v_rows[keys_of_tile<U>];
    PackedValues values{};

    ForwardBlock(const ForwardArgs& all_args, const Block& block, float* scratch)
        : args(all_args),
          sequence(args.sequences[block.sequence]),
          batch(block.sequence),
          head(block.head),
          head_kv(head / args.group),
          q_begin(block.first),
          q_end(q_begin + args.block_q < sequence.seqlen_q ? q_begin + args.block_q
                                                           : sequence.seqlen_q),
          panels((q_end - q_begin + N - 1) / N),
          scoring(scoring_of(args, batch, head)),
          has_mask(args.mask.element != ElementType::none),
          at(args, panels),
          memory(scratch),
          panel(reinterpret_cast<Panel<S>*>(memory + at.panels)) {}

    int64_t next_tile_from(int64_t from) const {
        return next_tile(sequence.visible, q_begin, q_end - 1, from, keys_of_tile<U>);
    }
    const storage* row_of(const Rows& rows, int64_t key) const {
        return key_row<const storage>(rows, sequence, args.page_size, head_kv, key);
    }
    float* query_of(int64_t p) const { return memory + at.query + p * at.depth * N; }
    float* out_of(int64_t p) const { return memory + at.out + p * at.channels * N; }
    /// `rows` or less, where the last group of S::mr is not whole.
    static int64_t height(int64_t rows) { return rows < S::mr ? rows : S::mr; }

    /// pack_transposed() of rows of element type `type`.
    void pack(ElementType type, const storage* const* rows, int64_t count, int64_t stride_channel,
              int64_t height, int64_t pitch, int64_t channels, float* dst) const {
        if constexpr (U::tiles)  // the product takes whole tiles
            for (int64_t u = (channels + E - 1) / E; u < at.template units_of<E>(channels); ++u)
                for (int64_t r = 0; r < height; r += W) S::store(dst + u * pitch + r, vf{});
        with_units<S, U>(type, [&](auto units) {
            pack_transposed<S, decltype(units)>(rows, count, stride_channel, height, pitch,
                                                channels, dst);
        });
    }

    /// Packs Q, rotated with rotary on, and starts each row. Lanes past the last query hold zeros
    /// and are never stored.
    void load_queries() {
        for (int64_t i = 0; i < panels * N; i += W) {
            const storage* rows[W];
            for (int r = 0; r < W; ++r)
                rows[r] = query_row<const storage>(args.query, sequence, head, q_begin + i + r);
            const int64_t stride = rotate_queries(i, rows);
            float* query = query_of(i / N) + i % N;
            if constexpr (Q::quantised) {
                quantise_queries(rows, i, stride, query);
                continue;
            }
            pack(args.types.query, rows, q_end - q_begin - i, stride, W, N, args.head_dim, query);
            if (!args.qv.data) continue;  // else more channels of the same product
            for (int r = 0; r < W; ++r)
                rows[r] = query_row<const storage>(args.qv, sequence, head, q_begin + i + r);
            pack(args.types.query, rows, q_end - q_begin - i, args.qv.stride_channel, W, N,
                 args.head_dim_v, query + at.key_depth * N);
        }
        for (int64_t p = 0; p < panels; ++p) start(panel[p]);
    }

    const float* key_means_of_head() const {
        if (!args.key_means) return nullptr;
        const int64_t heads = batch * args.heads_kv + head_kv;
        return args.key_means + heads * args.means_pitch;
    }
    float* lanes_of(int64_t p) const { return memory + at.lanes + p * 4 * N; }

    /// Packs W queries from the block's i-th on as int8.
    void quantise_queries(const storage* const* rows, int64_t i, int64_t stride, float* query) {
        const float* mean = key_means_of_head();
        float *codes = memory + at.codes, *lanes = lanes_of(i / N) + i % N;
        const float* own[W];
        for (int r = 0; r < W; ++r) {
            CodeRow row{};
            own[r] = codes + r * at.code_pitch;
            if (q_begin + i + r < q_end)
                row = quantise_row_of<S, U, typename Q::query>(
                    args.types.query, rows[r], stride, args.head_dim, nullptr, mean, at.code_pitch,
                    codes + r * at.code_pitch);
            // Keys are larger by 128 where they have no sign.
            const int32_t begin = Q::offset ? -128 * row.sum : 0;
            __builtin_memcpy(lanes + r, &begin, sizeof begin);
            lanes[N + r] = row.scale;
            lanes[2 * N + r] = row.shift;
        }
        pack_transposed<S, FloatUnits<S, F32>>(own, q_end - q_begin - i, 1, W, N, at.key_depth,
                                               query);
    }

    /// The tile's keys as rows of int8, and their scales. `rows` points at them afterwards.
    void quantise_keys(int64_t stride, const float** rows) {
        const float* mean = key_means_of_head();
        float* codes = memory + at.codes;
        for (int64_t k = 0; k < keys; ++k, codes += at.code_pitch) {
            rows[k] = codes;
            const CodeRow row =
                quantise_row_of<S, U, Q>(args.types.key, k_rows[k], stride, args.head_dim, mean,
                                         nullptr, at.code_pitch, codes);
            memory[at.key_scales + k] = row.scale;
            const int32_t bits = row.smoothed ? -1 : 0;
            __builtin_memcpy(memory + at.key_smoothed + k, &bits, sizeof bits);
        }
        for (int64_t k = keys; k < padded_rows<S>(keys); ++k)
            memory[at.key_scales + k] = memory[at.key_smoothed + k] = 0;
    }

    ScoreScales scales_of(int64_t p) const {
        if constexpr (Q::quantised)
            return {memory + at.key_scales, memory + at.key_smoothed, lanes_of(p)};
        return {};
    }

    /// With rotary on, rotates W queries from the block's i-th on and points `rows` at the result,
    /// which lies where the keys are packed later. Returns the rows' stride between channels.
    int64_t rotate_queries(int64_t i, const storage* (&rows)[W]) {
        if (args.rotary.element == ElementType::none) return args.query.stride_channel;
        storage* rotated = reinterpret_cast<storage*>(memory + at.key);
        const int64_t size = extent<U>(args.types.query, args.head_dim);
        for (int r = 0; r < W && q_begin + i + r < q_end; ++r, rotated += size) {
            rotate_row_of<S, U>(args.types.query, args.rotary, rows[r], args.query.stride_channel,
                                args.head_dim, position_of(args, sequence, q_begin + i + r),
                                rotated);
            rows[r] = rotated;
        }
        return 1;
    }

    /// Where the rows of the tile that begins at `first_key` are.
    void find_tile(int64_t first_key) {
        tile = first_key;
        const int64_t rest = sequence.seqlen_kv - tile;
        keys = rest < keys_of_tile<U> ? rest : keys_of_tile<U>;
        for (int64_t k = 0; k < keys; ++k) {
            k_rows[k] = row_of(args.key, tile + k);
            v_rows[k] = row_of(args.value, tile + k);
        }
        if constexpr (U::any) read_codes();
    }

    /// Writes the numbers of quantised keys and values.
    void read_codes() {
        if (args.key_codes.given)
            numbers_of_keys<S>(args, args.key_codes, sequence, head_kv, tile, keys, args.head_dim,
                               memory + at.numbers, k_rows);
        if (args.value_codes.given)
            numbers_of_keys<S>(args, args.value_codes, sequence, head_kv, tile, keys,
                               args.head_dim_v, memory + at.value_numbers, v_rows);
    }

    /// Packs the K and V of the tile that begins at `first_key`.
    void load_tile(int64_t first_key) {
        find_tile(first_key);
        load_keys();
        with_units<S, U>(args.types.value, [&](auto units) {
            values =
                pack_values<S, decltype(units)>(v_rows, keys, args.value.stride_channel,
                                                args.head_dim_v, at.value_pitch, memory + at.value);
        });
    }

    void load_keys() {
        const int64_t key_stride = rotate_keys();
        const int64_t padded = padded_rows<S>(keys);
        const float* codes[keys_of_tile<U>];
        if constexpr (Q::quantised) quantise_keys(key_stride, codes);
        for (int64_t k = 0; k < padded; k += S::mr) {
            const int64_t rows = height(padded - k);
            float* group = memory + at.key + k * at.depth;
            if constexpr (Q::quantised) {
                pack_transposed<S, FloatUnits<S, F32>>(codes + k, keys - k, 1, rows, rows,
                                                       at.key_depth, group);
                continue;
            }
            pack(args.types.key, k_rows + k, keys - k, key_stride, rows, rows, args.head_dim,
                 group);
            if (args.qv.data)
                pack(args.types.value, v_rows + k, keys - k, args.value.stride_channel, rows, rows,
                     args.head_dim_v, group + at.key_depth * rows);
        }
    }

    /// Rotates the tile's keys where rotary says so. Returns their stride between channels.
    int64_t rotate_keys() {
        if (!args.rotary.keys) return args.key.stride_channel;
        storage* rotated = reinterpret_cast<storage*>(memory + at.rotated);
        const int64_t size = extent<U>(args.types.key, args.head_dim);
        for (int64_t k = 0; k < keys; ++k, rotated += size) {
            rotate_row_of<S, U>(args.types.key, args.rotary, k_rows[k], args.key.stride_channel,
                                args.head_dim, tile + k, rotated);
            k_rows[k] = rotated;
        }
        return 1;
    }

    /// Prefetches panel p's share of what is needed next: the tile that begins at `next`; after the
    /// last one, the rows to be written and the next block. Always inlined: see prefetch_row().
    UMFA_INLINE void prefetch(int64_t p, int64_t next, const Block* next_block) const {
        if (next >= sequence.seqlen_kv) {
            const int64_t rows = q_end - q_begin;
            for (int64_t i = rows * p / panels; i < rows * (p + 1) / panels; ++i)
                prefetch_row(query_row<const storage>(args.out, sequence, head, q_begin + i),
                             args.out, extent<U>(args.types.out, args.head_dim_v));
            if (next_block) prefetch_block<U>(args, *next_block, p, panels);
            return;
        }
        const int64_t count =
            seen_by_some(sequence.visible, q_begin, q_end - 1, next, keys_of_tile<U>).end;
        for (int64_t k = next + count * p / panels; k < next + count * (p + 1) / panels; ++k) {
            prefetch_row(row_of(args.key, k), args.key, extent<U>(args.types.key, args.head_dim));
            prefetch_row(row_of(args.value, k), args.value,
                         extent<U>(args.types.value, args.head_dim_v));
        }
    }

    /// The groups of the tile that panel p computes. The others would add zeros.
    KeyGroups groups_of(int64_t p) const {
        const int64_t i0 = q_begin + p * N, i1 = (i0 + N < q_end ? i0 + N : q_end) - 1;
        const KeyRange some = seen_by_some(sequence.visible, i0, i1, tile, keys);
        KeyGroups groups{0, 0, 0, 0, seen_by_all(sequence.visible, i0, i1, tile, keys)};
        if (some.begin >= some.end) return groups;
        const auto down = [](int64_t key) { return key / S::mr * S::mr; };
        const auto up = [](int64_t key) { return (key + S::mr - 1) / S::mr * S::mr; };
        const int64_t padded = padded_rows<S>(keys), full = up(some.end);
        groups.first = down(some.begin);
        groups.last = full < padded ? full : padded;
        const int64_t open_first = up(groups.all.begin), open_last = down(groups.all.end);
        // A key with a score of -inf counts as hidden: if its value is inf or NaN, a weight of 0
        // does not hide it. For finite values it does.
        const bool open = !has_mask && values.finite && open_first < open_last;
        groups.open_first = open ? open_first : groups.last;
        groups.open_last = open ? open_last : groups.last;
        return groups;
    }

    /// Fetches part `part` of `parts` of the mask of the panel after p; after the last one comes the first
    /// one of the tile `next`.
    UMFA_INLINE void fetch_mask_after(int64_t p, int64_t next, int64_t part, int64_t parts) const {
        if (!has_mask) return;
        const bool is_last = p + 1 == panels;
        if (is_last && next >= sequence.seqlen_kv) return;
        const int64_t row = is_last ? q_begin : q_begin + (p + 1) * N;
        const int64_t rows = row + N < q_end ? N : q_end - row;
        fetch_mask(args.mask, batch, head, row + rows * part / parts,
                   row + rows * (part + 1) / parts, is_last ? next : tile, keys_of_tile<U>);
    }

    /// Reads the dense mask of panel p. Returns it, laid out as the scores, or null if there is
    /// none.
    const float* mask_tile(int64_t p, const KeyGroups& groups) {
        if (!has_mask) return nullptr;
        const int64_t row = q_begin + p * N, last = groups.last < keys ? groups.last : keys;
        mask_panel<S>(args.mask, batch, head, row, q_end - row, tile, groups.first, last,
                      memory + at.bias);
        return memory + at.bias;
    }

    /// Which keys the rows of panel p see; no maximum yet.
    void start_tile(int64_t p) {
        set_visible_rows(sequence.visible, q_begin + p * N, tile, keys, panel[p].visible);
        for (int64_t j = 0; j < N; ++j) panel[p].tile_maximum[j] = -__builtin_inff();
    }

    /// S^T of panel p: scaled, capped, biased; -inf where a key is hidden.
    void score_tile(int64_t p, const KeyGroups& groups) {
        const float* bias = mask_tile(p, groups);
        const int64_t row = q_begin + p * N;
        start_tile(p);
        (scoring.plain ? score_panel<S, Q, true>
                       : score_panel<S, Q, false>)(scoring, scales_of(p), memory + at.key,
                                                   query_of(p), at.depth, groups.first, groups.last,
                                                   groups.all.begin, groups.all.end,
                                                   diagonal_of(sequence, row, tile), bias,
                                                   memory + at.scores, panel[p]);
    }

    /// Scores -> probabilities, maxima and sums of panel p; then dropout.
    void softmax_tile(int64_t p, const KeyGroups& groups) {
        float* probabilities = memory + at.probabilities;
        (scoring.plain ? exponentials<S, P, true>
                       : exponentials<S, P, false>)(scoring, groups.first, groups.open_first,
                                                    groups.open_last, groups.last,
                                                    memory + at.scores, probabilities, panel[p]);
        if (args.dropout.threshold)
            drop_panel<S, P>(args.dropout, batch, head, q_begin + p * N, tile, groups.first,
                             groups.last, probabilities);
    }

    /// O^T = O^T * alpha + V^T P^T of panel p.
    void accumulate_tile(int64_t p, const KeyGroups& groups, int64_t next) {
        const int64_t units = (keys + E - 1) / E, Dv = args.head_dim_v;
        const int64_t first = groups.first / E;
        const int64_t last = groups.last / E < units ? groups.last / E : units;
        const float *value = memory + at.value, *probabilities = memory + at.probabilities;
        float* out = out_of(p);
        if (!values.finite)
            accumulate_guarded<S, P>(Dv, value, at.value_pitch, probabilities, first, last,
                                     panel[p], out);
        else
            for (int64_t c = 0; c < at.channels; c += S::mr) {
                fetch_mask_after(p, next, c / S::mr, (at.channels + S::mr - 1) / S::mr);
                with_height<S>(height(at.channels - c), [&](auto rows) {
                    accumulate<S, P, decltype(rows)::value>(
                        value + first * at.value_pitch + c, at.value_pitch,
                        probabilities + first * N, last - first, panel[p], out + c * N);
                });
            }
        if constexpr (U::flushes)
            if (values.tiny)
                accumulate_left_out<S, U>(v_rows, args.value.stride_channel, keys, Dv,
                                          probabilities, groups.first, groups.last, out);
        panel[p].fresh = false;
    }

    /// O / sum, transposed back, and LSE. A row that saw no key: 0, and LSE -inf.
    void store_rows() {
        const int64_t rows = q_end - q_begin;
        for (int64_t i = 0; i < rows; ++i) {
            float& sum = panel[i / N].sum[i % N];
            const float maximum = panel[i / N].maximum[i % N];
            sum = divisor_of(args, scoring, head, maximum, sum);
            store_lse(args, scoring, batch, head, q_begin + i, maximum, sum);
            sum *= args.dropout.kept;
        }
        with_units<S, U>(args.types.out, [&](auto units) {
            using T = typename decltype(units)::type;
            Rows layout = args.out;
            if (U::any) layout.stride_row /= int64_t{sizeof(typename T::storage)};
            for (int64_t i = 0; i < rows; i += W)
                store_transposed<S, T>(out_of(i / N) + i % N, N, panel[i / N].sum + i % N, rows - i,
                                       args.head_dim_v,
                                       reinterpret_cast<typename T::storage*>(query_row<storage>(
                                           args.out, sequence, head, q_begin + i)),
                                       layout);
        });
    }
};

template <class S, class U, class Work = ForwardBlock<S, U>>
void forward_block(const ForwardArgs& args, const Block& block, const Block* next_block,
                   float* scratch) {
    Work work(args, block, scratch);
    work.load_queries();
    for (int64_t tile = work.next_tile_from(0), next; tile < work.sequence.seqlen_kv; tile = next) {
        next = work.next_tile_from(tile + keys_of_tile<U>);
        work.load_tile(tile);
        for (int64_t p = 0; p < work.panels; ++p) {
            work.prefetch(p, next, next_block);
            const KeyGroups groups = work.groups_of(p);
            if (groups.empty()) continue;
            work.score_tile(p, groups);
            work.softmax_tile(p, groups);
            work.accumulate_tile(p, groups, next);
        }
    }
    work.store_rows();
}

template <class S, class U>
int64_t forward_scratch_floats(const ForwardArgs& args) {
    constexpr int64_t N = S::nv * S::W;
    return Scratch<S, U>(args, (args.block_q + N - 1) / N).size;
}

}  // namespace
}  // namespace umfa::cpu
