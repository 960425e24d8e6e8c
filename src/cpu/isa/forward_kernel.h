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
// Included inside an anonymous namespace of each kernel file, after simd.h and a `Simd` that adds
// `mr` (keys or channels per micro-tile) and `nv` (vectors of queries per panel).

constexpr int64_t block_kv = 96;

#include "cpu/isa/lanes.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/product.h"
#include "cpu/isa/softmax.h"
#include "cpu/isa/units.h"

template <class S>
constexpr int64_t panel_floats = (sizeof(Panel<S>) + 63) / 64 * 16;

/// Where the pieces of a task's scratch begin, in floats. Those that vectors are aligned for come
/// first: their sizes are multiples of a panel's lanes.
template <class S, class U>
struct Scratch {
    static constexpr int64_t N = S::nv * S::W, slack = 64;
    int64_t depth, channels;  // units of Q.K; padded channels of O
    int64_t value_pitch;
    int64_t panels, scores, probabilities, query, out, key, value, size;

    Scratch(const ForwardArgs& args, int64_t panel_count) {
        depth = (args.head_dim + U::E - 1) / U::E;
        channels = padded_rows<S>(args.head_dim_v);
        panels = 0;
        scores = panels + panel_count * panel_floats<S>;
        probabilities = scores + (U::E == 1 ? 0 : block_kv * N);
        query = probabilities + block_kv * N;    // [panel][depth][N]
        out = query + panel_count * depth * N;   // [panel][channels][N]
        key = out + panel_count * channels * N;  // [group][depth][mr]
        value = key + block_kv * depth + slack;
        // An odd number of cache lines: rows of V spread over all sets of the L1 cache.
        value_pitch = ((channels + 15) / 16 | 1) * 16;
        size = value + block_kv / U::E * value_pitch + slack;
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

/// The same where a hidden V row holds inf or NaN: 0 * NaN must not reach the rows that do not see
/// it. Same operations in the same order, so visible rows keep their bits.
template <class S, class U>
inline void accumulate_guarded(int64_t channels, const float* value, int64_t pitch, const float* p,
                               int64_t first_unit, int64_t last_unit, const Panel<S>& panel,
                               bool fresh, float* o) {
    using vf = typename S::vf;
    using vi = typename S::vi;
    constexpr int NV = S::nv, W = S::W;
    constexpr int bits = 32 / U::E;
    for (int n = 0; n < NV; ++n) {
        const vi begin = S::load_int(panel.begin + n * W), end = S::load_int(panel.end + n * W);
        const vf alpha = S::load(panel.alpha + n * W);
        for (int64_t c = 0; c < channels; ++c) {
            vf acc{};
            for (int64_t k = first_unit; k < last_unit; ++k) {
                vi seen{};
                for (int e = 0; e < U::E; ++e) {
                    const vi key = vi{} + static_cast<int32_t>(k * U::E + e);
                    const vi here = (key >= begin) & (key < end);
                    seen |= here & (vi{} + static_cast<int32_t>(((1ll << bits) - 1) << e * bits));
                }
                const vf v = (vf)((vi)S::splat_bits(value + k * pitch + c) & seen);
                acc = U::fma(acc, v, S::load(p + (k * NV + n) * W));
            }
            float* at = o + (c * NV + n) * W;
            S::store(at, fresh ? acc : S::load(at) * alpha + acc);
        }
    }
}

/// Adds what pack_values left out. Hidden keys add 0, which changes no bits.
template <class S, class U>
inline void accumulate_tiny(const typename U::storage* rows, const Rows& layout, int64_t keys,
                            int64_t channels, const float* p, int64_t first, int64_t last,
                            float* o) {
    using vf = typename S::vf;
    using vu = typename S::vu;
    constexpr int NV = S::nv, W = S::W;
    for (int64_t k = first; k < last && k < keys; ++k)
        for (int64_t c = 0; c < channels; ++c) {
            const auto value = rows[k * layout.stride_row + c * layout.stride_channel];
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
                                     int64_t depth, int32_t first, int32_t diagonal, float* scores,
                                     Panel<S>& panel) {
    using vf = typename S::vf;
    micro_kernel<S, U, MR>(
        key, MR, query, depth, [&](vf(&acc)[MR][S::nv]) __attribute__((always_inline)) {
            finish_scores<S, Masked, Plain>(acc, scoring, first, diagonal, scores, panel);
        });
}

/// The same for keys [first, last) of a tile, in groups of mr. Groups inside
/// [seen_begin, seen_end) are seen by every row.
template <class S, class U, bool Plain>
inline void score_panel(const Scoring& scoring, const float* key, const float* query, int64_t depth,
                        int64_t first, int64_t last, int64_t seen_begin, int64_t seen_end,
                        int32_t diagonal, float* scores, Panel<S>& panel) {
    for (int64_t k = first; k < last; k += S::mr)
        with_height<S>(last - k < S::mr ? last - k : S::mr, [&](auto height) {
            constexpr int MR = decltype(height)::value;
            const bool masked = k < seen_begin || k + MR > seen_end;
            (masked ? score<S, U, true, Plain, MR>
                    : score<S, U, false, Plain, MR>)(scoring, key + k * depth, query, depth,
                                                     static_cast<int32_t>(k), diagonal,
                                                     scores + k * S::nv * S::W, panel);
        });
}

/// The tile's keys that each row of a panel sees: visible_begin and visible_end, lane by lane.
template <class S>
inline void set_visible(const ForwardArgs& args, int64_t first_query, int64_t first_key,
                        int64_t keys, Panel<S>& panel) {
    constexpr int32_t N = S::nv * S::W;
    const int64_t center = first_query + args.visible.offset - first_key;
    const auto near = [&](int64_t key) {
        return static_cast<int32_t>(key < -N ? -N : key > keys ? keys : key);
    };
    const int32_t begin = args.visible.left < 0 ? -N : near(center - args.visible.left);
    const int32_t end =
        args.visible.right < 0 ? int32_t(keys) : near(center + args.visible.right + 1);
    const int32_t last = static_cast<int32_t>(keys);
    for (int32_t j = 0; j < N; ++j) {
        const int32_t b = begin + j, e = end + j;
        panel.begin[j] = b < 0 ? 0 : b > last ? last : b;
        panel.end[j] = e < 0 ? 0 : e > last ? last : e;
        panel.tile_maximum[j] = -__builtin_inff();
    }
}

/// Into the L2 cache: into L1, a tile ahead, is too early (10 instead of 21 GB/s on Zen 4). Always
/// inlined, because GCC 12 takes a function that only prefetches for one without effect.
template <class storage>
inline __attribute__((always_inline)) void prefetch_row(const storage* row, const Rows& layout,
                                                        int64_t channels) {
    if (layout.stride_channel != 1) return;
    constexpr int64_t line = 64 / sizeof(storage);
    for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(row + c, 0, 2);
}

inline int32_t clamp_key(int64_t key, int64_t keys) {
    return static_cast<int32_t>(key < 0 ? 0 : key > keys ? keys : key);
}

template <class S, class U>
void forward_block(const ForwardArgs& args, int64_t batch, int64_t head, int64_t q_begin,
                   float* memory) {
    using storage = typename U::storage;
    constexpr int64_t N = S::nv * S::W;
    constexpr int W = S::W, E = U::E;
    constexpr float infinity = __builtin_inff();
    const int64_t D = args.head_dim, Dv = args.head_dim_v, head_kv = head / args.group;
    const int64_t q_end =
        q_begin + args.block_q < args.seqlen_q ? q_begin + args.block_q : args.seqlen_q;
    const int64_t panels = (q_end - q_begin + N - 1) / N;
    const Scoring scoring = scoring_of(args, batch, head);

    const Scratch<S, U> at(args, panels);
    Panel<S>* panel = reinterpret_cast<Panel<S>*>(memory + at.panels);
    float *scores = memory + at.scores, *probabilities = memory + at.probabilities;
    float *key = memory + at.key, *value = memory + at.value;
    const auto head_of = [&](const Rows& rows, int64_t h) {
        return static_cast<storage*>(rows.data) + batch * rows.stride_batch + h * rows.stride_head;
    };

    // Lanes past the last query hold zeros and are never stored.
    const storage* q = head_of(args.query, head);
    for (int64_t i = 0; i < panels * N; i += W) {
        float* to = memory + at.query + i / N * at.depth * N + i % N;
        const int64_t rows = q_end - q_begin - i;
        pack_transposed<S, U>(q + (q_begin + i) * args.query.stride_row, args.query, rows, W, N, D,
                              to);
    }
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t j = 0; j < N; ++j) {
            panel[p].maximum[j] = -infinity;
            panel[p].sum[j] = 0;
            panel[p].fresh = true;
        }

    // Visible ranges grow with the query, so the first and last rows bound the block.
    const int64_t first_key = visible_begin(args.visible, q_begin);
    const int64_t last_key = visible_end(args.visible, q_end - 1);
    for (int64_t k0 = first_key / block_kv * block_kv; k0 < last_key; k0 += block_kv) {
        const int64_t keys = args.seqlen_kv - k0 < block_kv ? args.seqlen_kv - k0 : block_kv;
        const storage* k_rows = head_of(args.key, head_kv) + k0 * args.key.stride_row;
        const storage* v_rows = head_of(args.value, head_kv) + k0 * args.value.stride_row;
        const int64_t padded = padded_rows<S>(keys);
        for (int64_t k = 0; k < padded; k += S::mr) {
            const int64_t height = padded - k < S::mr ? padded - k : S::mr;
            pack_transposed<S, U>(k_rows + k * args.key.stride_row, args.key, keys - k, height,
                                  height, D, key + k * at.depth);
        }
        const int64_t units = (keys + E - 1) / E;
        const bool tiny = pack_values<S, U>(v_rows, args.value, keys, Dv, at.value_pitch, value);
        int finite = -1;  // not looked at yet
        const int64_t rest = last_key - k0 - keys, next = rest < block_kv ? rest : block_kv;

        for (int64_t p = 0; p < panels; ++p) {
            // Each panel asks for its share of the next tile, which may have to come from memory.
            for (int64_t k = keys + next * p / panels; k < keys + next * (p + 1) / panels; ++k) {
                prefetch_row(k_rows + k * args.key.stride_row, args.key, D);
                prefetch_row(v_rows + k * args.value.stride_row, args.value, Dv);
            }
            const int64_t i0 = q_begin + p * N, i1 = (i0 + N < q_end ? i0 + N : q_end) - 1;
            const int64_t begin = clamp_key(visible_begin(args.visible, i0) - k0, keys);
            const int64_t end = clamp_key(visible_end(args.visible, i1) - k0, keys);
            if (begin >= end) continue;  // no row of the panel sees the tile
            const int64_t seen_begin = clamp_key(visible_begin(args.visible, i1) - k0, keys);
            const int64_t seen_end = clamp_key(visible_end(args.visible, i0) - k0, keys);
            // Only the groups of keys that some row sees. What is left out would add zeros.
            const int64_t first = begin / S::mr * S::mr;
            const int64_t full = (end + S::mr - 1) / S::mr * S::mr;
            const int64_t last = full < padded ? full : padded;
            const bool masked = first < seen_begin || last > seen_end;
            set_visible(args, i0, k0, keys, panel[p]);
            const bool fresh = panel[p].fresh;
            panel[p].fresh = false;
            const int32_t diagonal = static_cast<int32_t>(i0 + args.seqlen_kv - args.seqlen_q - k0);
            const float* query = memory + at.query + p * at.depth * N;
            const auto softmax = [&](auto plain) {
                constexpr bool Plain = decltype(plain)::value;
                score_panel<S, U, Plain>(scoring, key, query, at.depth, first, last, seen_begin,
                                         seen_end, diagonal, scores, panel[p]);
                if (masked)
                    exponentials<S, U, true, Plain>(scoring, first, last, scores, probabilities,
                                                    panel[p]);
                else
                    exponentials<S, U, false, Plain>(scoring, first, last, scores, probabilities,
                                                     panel[p]);
            };
            if (scoring.plain)
                softmax(Constant<1>{});
            else
                softmax(Constant<0>{});

            const int64_t first_unit = first / E;
            const int64_t last_unit = last / E < units ? last / E : units;
            const bool partly = begin < seen_begin || end > seen_end;
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
                    accumulate_tiny<S, U>(v_rows, args.value, keys, Dv, probabilities, first, last,
                                          o);
        }
    }

    // O / sum, transposed back. A row that saw no key: 0, and LSE -inf.
    for (int64_t i = 0; i < q_end - q_begin; i += W)
        store_transposed<S, typename U::type>(
            memory + at.out + i / N * at.channels * N + i % N, N, panel[i / N].sum + i % N,
            q_end - q_begin - i, Dv, head_of(args.out, head) + (q_begin + i) * args.out.stride_row,
            args.out);
    for (int64_t i = 0; i < q_end - q_begin; ++i)
        store_lse(args, scoring, batch, head, q_begin + i, panel[i / N].maximum[i % N],
                  panel[i / N].sum[i % N]);
}

template <class S, class U>
int64_t forward_scratch_floats(const ForwardArgs& args) {
    constexpr int64_t N = S::nv * S::W;
    return Scratch<S, U>(args, (args.block_q + N - 1) / N).size;
}
