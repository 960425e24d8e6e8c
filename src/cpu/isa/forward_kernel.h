// Forward attention for one block of queries: online softmax over key tiles (Milakov & Gimelshein
// 2018; Dao et al. 2022), in exp2 with log2(e) folded into the scale.
//
// Everything is transposed: queries lie along the vector lanes. S^T = K Q^T broadcasts K, and
// O^T += V^T P^T broadcasts V, both from packed panels; the softmax between them needs no shuffle,
// and P^T is already laid out for the second product. A tile of K and V is packed once for all
// panels of the block: heads of a (seqlen, heads, channels) tensor lie so far apart that twelve
// rows in place would share one set of the L1 cache.
//
// Key tiles start at multiples of block_kv whatever the block of queries, and lanes never mix: the
// bits of a row do not depend on block sizes, threads, or the other rows.
//
// S is an instruction set's vectors, with `mr` (keys or channels per micro-tile) and `nv` (vectors of
// queries per panel); U is what the micro-kernels multiply.
#pragma once

#include "cpu/isa/bias.h"
#include "cpu/isa/dropout.h"
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
    static constexpr int64_t N = S::nv * S::W, slack = 64;
    int64_t key_depth, depth, channels;  // units of Q.K; with those of QV.V; padded channels of O
    int64_t value_pitch;
    int64_t panels, scores, probabilities, bias, query, out, key, value, rotated, size;

    Scratch(const ForwardArgs& args, int64_t panel_count) {
        key_depth = (args.head_dim + U::E - 1) / U::E;
        depth = key_depth + (args.qv.data ? (args.head_dim_v + U::E - 1) / U::E : 0);
        channels = padded_rows<S>(args.head_dim_v);
        panels = 0;
        scores = panels + panel_count * panel_floats<S>;
        probabilities = scores + (U::E == 1 ? 0 : block_kv * N);
        bias = probabilities + block_kv * N;  // [key][lane], and what whole vectors of keys add
        query = bias + (args.mask.element == ElementType::none
                            ? 0
                            : (block_kv + S::W) * N);  // [panel][depth][N]
        out = query + panel_count * depth * N;         // [panel][channels][N]
        key = out + panel_count * channels * N;        // [group][depth][mr]
        value = key + block_kv * depth + slack;
        // An odd number of cache lines: rows of V spread over all sets of the L1 cache.
        value_pitch = ((channels + 15) / 16 | 1) * 16;
        rotated = value + block_kv / U::E * value_pitch + slack;
        size = rotated + (args.rotary.keys ? block_kv * args.head_dim : 0);
    }
};

/// O^T of one panel, MR channels of it: O^T = O^T * alpha + V^T P^T; without the first term where
/// O is `fresh`.
/// The sum starts at zero and meets O once: a long series of tiles rounds O once per tile, not once
/// per key, so that 2**24 keys of equal weight still count.
template <class S, class U, int MR>
__attribute__((noinline)) void accumulate(const float* value, int64_t pitch, const float* p,
                                          int64_t units, const Panel<S>& panel, bool fresh,
                                          float* o) {
    using vf = typename S::vf;
    micro_kernel<S, U, MR>(value, pitch, p, units,
                           [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
                               for (int n = 0; n < S::nv; ++n)
                                   for (int m = 0; m < MR; ++m) {
                                       float* to = o + (m * S::nv + n) * S::W;
                                       vf sum = acc[m][n];
                                       if (!fresh)
                                           sum += S::load(to) * S::load(panel.alpha + n * S::W);
                                       S::store(to, sum);
                                   }
                           });
}

/// The same where a hidden V row holds inf or NaN: -0 * NaN must not reach the rows that do not see
/// it. Same operations in the same order, so visible rows keep their bits.
template <class S, class U>
inline void accumulate_guarded(int64_t channels, const float* value, int64_t pitch, const float* p,
                               int64_t first_unit, int64_t last_unit, const Panel<S>& panel,
                               bool fresh, float* o) {
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
            S::store(at, fresh ? acc : S::load(at) * alpha + acc);
        }
    }
}

/// Adds what pack_values left out. Hidden keys add 0, which changes no bits.
template <class S, class U>
inline void accumulate_tiny(const typename U::storage* const* rows, int64_t stride_channel,
                            int64_t keys, int64_t channels, const float* p, int64_t first,
                            int64_t last, float* o) {
    using vf = typename S::vf;
    using vu = typename S::vu;
    constexpr int NV = S::nv, W = S::W;
    for (int64_t k = first; k < last && k < keys; ++k)
        for (int64_t c = 0; c < channels; ++c) {
            const auto value = rows[k][c * stride_channel];
            if (!U::is_tiny(value)) continue;
            const vf v = (vf)(vu{} + (uint32_t{value} << 16));
            for (int n = 0; n < NV; ++n) {
                const vu pair = (vu)S::load(p + (k / U::E * NV + n) * W);
                float* at = o + (c * NV + n) * W;
                S::store(at, S::load(at) + v * (vf)(k % U::E ? pair & 0xffff0000u : pair << 16));
            }
        }
}

/// S^T of one panel for MR keys from `first` on.
template <class S, class U, bool Masked, bool Plain, int MR>
__attribute__((noinline)) void score(const Scoring& scoring, const float* key, const float* query,
                                     int64_t depth, int32_t first, int32_t diagonal,
                                     const float* bias, float* scores, Panel<S>& panel) {
    using vf = typename S::vf;
    micro_kernel<S, U, MR>(
        key, MR, query, depth, [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
            finish_scores<S, Masked, Plain>(acc, scoring, first, diagonal, bias, scores, panel);
        });
}

/// The same for keys [first, last) of a tile, in groups of mr. Groups inside
/// [seen_begin, seen_end) are seen by every row.
template <class S, class U, bool Plain>
inline void score_panel(const Scoring& scoring, const float* key, const float* query, int64_t depth,
                        int64_t first, int64_t last, int64_t seen_begin, int64_t seen_end,
                        int32_t diagonal, const float* bias, float* scores, Panel<S>& panel) {
    for (int64_t k = first; k < last; k += S::mr)
        with_height<S>(last - k < S::mr ? last - k : S::mr, [&](auto height) {
            constexpr int MR = decltype(height)::value;
            const bool masked = k < seen_begin || k + MR > seen_end;
            (masked ? score<S, U, true, Plain, MR>
                    : score<S, U, false, Plain, MR>)(scoring, key + k * depth, query, depth,
                                                     static_cast<int32_t>(k), diagonal,
                                                     bias ? bias + k * S::nv * S::W : nullptr,
                                                     scores + k * S::nv * S::W, panel);
        });
}

/// Asks for a share, part of parts, of the rows that a block begins with: its queries and its first
/// tile of keys and values. Without it, 512 keys from memory took a tenth of the time.
template <class storage>
inline void prefetch_block(const ForwardArgs& args, const Block& block, int64_t part,
                           int64_t parts) {
    const Sequence& sequence = args.sequences[block.sequence];
    const int64_t rest = sequence.seqlen_q - block.first;
    const int64_t queries = rest < args.block_q ? rest : args.block_q;
    for (int64_t i = queries * part / parts; i < queries * (part + 1) / parts; ++i) {
        prefetch_row(query_row<const storage>(args.query, sequence, block.head, block.first + i),
                     args.query, args.head_dim);
        if (args.qv.data)
            prefetch_row(query_row<const storage>(args.qv, sequence, block.head, block.first + i),
                         args.qv, args.head_dim_v);
    }
    const int64_t first =
        next_tile(sequence.visible, block.first, block.first + queries - 1, int64_t{0}, block_kv);
    const int64_t left = sequence.seqlen_kv - first, keys = left < block_kv ? left : block_kv;
    for (int64_t k = first + keys * part / parts; k < first + keys * (part + 1) / parts; ++k) {
        const int64_t head = block.head / args.group;
        prefetch_row(key_row<const storage>(args.key, sequence, args.page_size, head, k), args.key,
                     args.head_dim);
        prefetch_row(key_row<const storage>(args.value, sequence, args.page_size, head, k),
                     args.value, args.head_dim_v);
    }
}

template <class S, class U>
void forward_block(const ForwardArgs& args, const Block& block, const Block* next_block,
                   float* memory) {
    using storage = typename U::storage;
    const int64_t batch = block.sequence, head = block.head, q_begin = block.first;
    constexpr int64_t N = S::nv * S::W;
    constexpr int W = S::W, E = U::E;
    constexpr float infinity = __builtin_inff();
    const Sequence& sequence = args.sequences[batch];
    const Visible<int64_t>& visible = sequence.visible;
    const int64_t D = args.head_dim, Dv = args.head_dim_v, head_kv = head / args.group;
    const int64_t q_end =
        q_begin + args.block_q < sequence.seqlen_q ? q_begin + args.block_q : sequence.seqlen_q;
    const int64_t panels = (q_end - q_begin + N - 1) / N;
    const Scoring scoring = scoring_of(args, batch, head);
    const bool has_mask = args.mask.element != ElementType::none;

    const Scratch<S, U> at(args, panels);
    Panel<S>* panel = reinterpret_cast<Panel<S>*>(memory + at.panels);
    float *scores = memory + at.scores, *probabilities = memory + at.probabilities;
    float *key = memory + at.key, *value = memory + at.value;
    float* bias = has_mask ? memory + at.bias : nullptr;

    // Lanes past the last query hold zeros and are never stored.
    for (int64_t i = 0; i < panels * N; i += W) {
        const storage* rows[W];
        for (int r = 0; r < W; ++r)
            rows[r] = query_row<const storage>(args.query, sequence, head, q_begin + i + r);
        int64_t stride = args.query.stride_channel;
        if (args.rotary.element !=
            ElementType::none) {  // in the place of the keys, which come later
            storage* rotated = reinterpret_cast<storage*>(memory + at.key);
            for (int r = 0; r < W && q_begin + i + r < q_end; ++r, rotated += D) {
                rotate_row<S, typename U::type>(args.rotary, rows[r], stride, D,
                                                position_of(args, sequence, q_begin + i + r),
                                                rotated);
                rows[r] = rotated;
            }
            stride = 1;
        }
        float* query = memory + at.query + i / N * at.depth * N + i % N;
        pack_transposed<S, U>(rows, q_end - q_begin - i, stride, W, N, D, query);
        if (!args.qv.data) continue;  // else more channels of the same product
        for (int r = 0; r < W; ++r)
            rows[r] = query_row<const storage>(args.qv, sequence, head, q_begin + i + r);
        pack_transposed<S, U>(rows, q_end - q_begin - i, args.qv.stride_channel, W, N, Dv,
                              query + at.key_depth * N);
    }
    for (int64_t p = 0; p < panels; ++p) {
        panel[p].fresh = true;
        for (int64_t j = 0; j < N; ++j) {
            panel[p].maximum[j] = -infinity;
            panel[p].sum[j] = 0;
        }
    }

    const auto tile_from = [&](int64_t from) {
        return next_tile(visible, q_begin, q_end - 1, from, block_kv);
    };
    for (int64_t k0 = tile_from(0), next; k0 < sequence.seqlen_kv; k0 = next) {
        next = tile_from(k0 + block_kv);
        const int64_t rest = sequence.seqlen_kv - k0, keys = rest < block_kv ? rest : block_kv;
        const storage *k_rows[block_kv], *v_rows[block_kv];
        for (int64_t k = 0; k < keys; ++k) {
            k_rows[k] = key_row<const storage>(args.key, sequence, args.page_size, head_kv, k0 + k);
            v_rows[k] =
                key_row<const storage>(args.value, sequence, args.page_size, head_kv, k0 + k);
        }
        int64_t key_stride = args.key.stride_channel;
        if (args.rotary.keys) {
            storage* rotated = reinterpret_cast<storage*>(memory + at.rotated);
            for (int64_t k = 0; k < keys; ++k, rotated += D) {
                rotate_row<S, typename U::type>(args.rotary, k_rows[k], key_stride, D, k0 + k,
                                                rotated);
                k_rows[k] = rotated;
            }
            key_stride = 1;
        }
        const int64_t padded = padded_rows<S>(keys);
        for (int64_t k = 0; k < padded; k += S::mr) {
            const int64_t height = padded - k < S::mr ? padded - k : S::mr;
            float* group = key + k * at.depth;
            pack_transposed<S, U>(k_rows + k, keys - k, key_stride, height, height, D, group);
            if (args.qv.data)
                pack_transposed<S, U>(v_rows + k, keys - k, args.value.stride_channel, height,
                                      height, Dv, group + at.key_depth * height);
        }
        const int64_t units = (keys + E - 1) / E;
        const bool tiny =
            pack_values<S, U>(v_rows, keys, args.value.stride_channel, Dv, at.value_pitch, value);
        int finite = -1;  // not looked at yet
        const int64_t ahead = seen_by_some(visible, q_begin, q_end - 1, next, block_kv).end;

        for (int64_t p = 0; p < panels; ++p) {
            // Each panel asks for its share of what comes next and may have to come from memory:
            // another tile; after the last, the rows to be written and the next block.
            if (next >= sequence.seqlen_kv) {
                const int64_t rows = q_end - q_begin;
                for (int64_t i = rows * p / panels; i < rows * (p + 1) / panels; ++i)
                    prefetch_row(query_row<const storage>(args.out, sequence, head, q_begin + i),
                                 args.out, Dv);
                if (next_block) prefetch_block<storage>(args, *next_block, p, panels);
            }
            for (int64_t k = next + ahead * p / panels; k < next + ahead * (p + 1) / panels; ++k) {
                prefetch_row(key_row<const storage>(args.key, sequence, args.page_size, head_kv, k),
                             args.key, D);
                prefetch_row(
                    key_row<const storage>(args.value, sequence, args.page_size, head_kv, k),
                    args.value, Dv);
            }
            const int64_t i0 = q_begin + p * N, i1 = (i0 + N < q_end ? i0 + N : q_end) - 1;
            const KeyRange some = seen_by_some(visible, i0, i1, k0, keys);
            if (some.begin >= some.end) continue;
            const KeyRange all = seen_by_all(visible, i0, i1, k0, keys);
            // Only the groups of keys that some row sees. What is left out would add zeros.
            const int64_t first = some.begin / S::mr * S::mr;
            const int64_t full = (some.end + S::mr - 1) / S::mr * S::mr;
            const int64_t last = full < padded ? full : padded;
            // The groups that every row sees, if there is no mask that knows better.
            const int64_t open_begin = (all.begin + S::mr - 1) / S::mr * S::mr;
            const int64_t open_end = all.end / S::mr * S::mr;
            const bool open = !has_mask && open_begin < open_end;
            const int64_t open_first = open ? open_begin : last, open_last = open ? open_end : last;
            set_visible_rows(visible, i0, k0, keys, panel[p].visible);
            for (int64_t j = 0; j < N; ++j) panel[p].tile_maximum[j] = -infinity;
            const bool fresh = panel[p].fresh;
            panel[p].fresh = false;
            const int32_t diagonal =
                static_cast<int32_t>(i0 + sequence.seqlen_kv - sequence.seqlen_q - k0);
            const float* query = memory + at.query + p * at.depth * N;
            if (has_mask)
                mask_panel<S>(args.mask, batch, head, i0, q_end - i0, k0, first,
                              last < keys ? last : keys, bias);
            const auto softmax = [&](auto plain) {
                constexpr bool Plain = decltype(plain)::value;
                score_panel<S, U, Plain>(scoring, key, query, at.depth, first, last, all.begin,
                                         all.end, diagonal, bias, scores, panel[p]);
                exponentials<S, U, Plain>(scoring, first, open_first, open_last, last, scores,
                                          probabilities, panel[p]);
            };
            if (scoring.plain)
                softmax(Constant<1>{});
            else
                softmax(Constant<0>{});
            if (args.dropout.threshold)
                drop_panel<S, U>(args.dropout, batch, head, i0, k0, first, last, probabilities);

            const int64_t first_unit = first / E;
            const int64_t last_unit = last / E < units ? last / E : units;
            // Groups are computed whole: even where all rows see the same keys, some may be hidden.
            const bool partly =
                has_mask || first < all.begin || (last < keys ? last : keys) > all.end;
            if (partly && finite < 0)
                finite = all_finite<S, U>(value, at.value_pitch, 0, units, Dv);
            float* o = memory + at.out + p * at.channels * N;
            if (partly && !finite) {
                accumulate_guarded<S, U>(Dv, value, at.value_pitch, probabilities, first_unit,
                                         last_unit, panel[p], fresh, o);
            } else {
                for (int64_t c = 0; c < at.channels; c += S::mr)
                    with_height<S>(at.channels - c < S::mr ? at.channels - c : S::mr,
                                   [&](auto height) {
                                       accumulate<S, U, decltype(height)::value>(
                                           value + first_unit * at.value_pitch + c, at.value_pitch,
                                           probabilities + first_unit * N, last_unit - first_unit,
                                           panel[p], fresh, o + c * N);
                                   });
            }
            if constexpr (U::flushes)
                if (tiny)
                    accumulate_tiny<S, U>(v_rows, args.value.stride_channel, keys, Dv,
                                          probabilities, first, last, o);
        }
    }

    // O / sum, transposed back. A row that saw no key: 0, and LSE -inf.
    for (int64_t i = 0; i < q_end - q_begin; ++i) {
        float& sum = panel[i / N].sum[i % N];
        const float maximum = panel[i / N].maximum[i % N];
        sum = divisor_of(args, scoring, head, maximum, sum);
        store_lse(args, scoring, batch, head, q_begin + i, maximum, sum);
        sum *= args.dropout.kept;
    }
    for (int64_t i = 0; i < q_end - q_begin; i += W)
        store_transposed<S, typename U::type>(
            memory + at.out + i / N * at.channels * N + i % N, N, panel[i / N].sum + i % N,
            q_end - q_begin - i, Dv, query_row<storage>(args.out, sequence, head, q_begin + i),
            args.out);
}

template <class S, class U>
int64_t forward_scratch_floats(const ForwardArgs& args) {
    constexpr int64_t N = S::nv * S::W;
    return Scratch<S, U>(args, (args.block_q + N - 1) / N).size;
}

}  // namespace
}  // namespace umfa::cpu
