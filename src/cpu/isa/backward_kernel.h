// Backward pass of attention, FlashAttention-2's (Dao 2023), with sums in float32. With
// P = exp(score - lse) and delta = rowsum(dout * out) - dlse,
//   dV += P^T dO,  dS = P * (dO V^T - delta),  dQ += dS K,  dK += dS^T Q.
// backward_run() at the end is the algorithm.
//
// As in forward_kernel.h, the scores are transposed: queries lie along the lanes. S^T = K Q^T and
// dP^T = V dO^T broadcast K and V; the sums broadcast P^T and dS^T, and have channels along the lanes.
// A block of keys is packed once for all queries of the task, a tile of queries once for each block.
//
// U is what the products multiply. Of bfloat16 units, P and dS are rounded to bfloat16 for the three sums,
// as in PyTorch's kernels; P * (dP - delta) is computed from floats. Nothing that is tiny is left out (see
// Bf16Units): a gradient of 2**-118 has the error that it has in PyTorch.
//
// Tiles of queries and blocks of keys begin at multiples of their sizes, which depend on the head dims
// alone. So a gradient's terms are added in the same order however a pass is cut into tasks.
#pragma once

#include "cpu/isa/backward_products.h"
#include "cpu/isa/backward_rows.h"
#include "cpu/isa/backward_scores.h"
#include "cpu/isa/backward_scratch.h"
#include "cpu/isa/bias.h"
#include "cpu/isa/dropout.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/rotary.h"
#include "cpu/isa/rows.h"

namespace umfa::cpu {
namespace {

/// One head of a task while it goes over queries and keys.
template <class S, class U>
struct BackwardWork {
    using P = typename U::product;
    static constexpr int W = S::W, E = U::E;
    static constexpr int64_t query_tile = queries_of_tile<U>;
    static constexpr int64_t N = S::nv * S::W, panels = query_tile / N;

    const BackwardArgs& args;
    const BackwardTask& task;
    const BackwardScratch<S, U> at;
    float* const memory;

    // The head, and its block of keys.
    int64_t index = 0;  // in the task
    SequenceHead head{};
    const Sequence* sequence = nullptr;
    Scoring scoring{};
    int64_t query_end = 0, key_end = 0;  // of the sequence and the task
    int64_t block = 0, block_keys = 0;
    bool finite_keys = true;
    int64_t packed_sequence = -1, packed_head = -1, packed_block = -1;
    // The tile of queries.
    int64_t row = 0;
    bool finite_queries = true, finite_douts = true;
    // The tile of keys, and the groups of S::mr keys that each panel computes, and all of them.
    int64_t tile = 0, keys = 0;
    int64_t first[panels], last[panels], union_first = 0, union_last = 0;
    RowStatistics<S> rows[panels];
    typename S::vf slope_sum{};

    BackwardWork(const BackwardArgs& all_args, const BackwardTask& all_task, float* scratch)
        : args(all_args), task(all_task), at(all_args, all_task), memory(scratch) {}

    void clear(int64_t from, int64_t floats) const {
        for (int64_t i = 0; i < floats; ++i) memory[from + i] = 0;
    }
    bool wants_gradients() const {
        return task.dquery || task.dmask.data || task.dslopes || args.dkey.data ||
               (args.qv.data && args.dvalue.data);
    }

    void start_head(int64_t i) {
        index = i;
        head = task.heads[i];
        sequence = &args.sequences[head.sequence];
        query_end = smaller(task.query_end, sequence->seqlen_q);
        key_end = smaller(task.key_end, sequence->seqlen_kv);
        scoring.scale = args.score_scale;
        scoring.scale_low = args.score_scale_low;
        scoring.softcap = args.softcap;
        scoring.slope = args.slopes ? args.slopes[head.sequence * args.slopes_stride_batch +
                                                  head.head * args.slopes_stride_head] *
                                          log2_e
                                    : 0.f;
        scoring.plain =
            args.softcap == 0 && scoring.slope == 0 && args.mask.element == ElementType::none;
        slope_sum = typename S::vf{};
    }

    /// Whether some query of [first_query, end) sees a key of [first_key, first_key + count).
    bool touched(int64_t first_query, int64_t end, int64_t first_key, int64_t count) const {
        const KeyRange some =
            seen_by_some(sequence->visible, first_query, end - 1, first_key, count);
        return some.begin < some.end;
    }

    /// Packs the block of keys that begins at `first_key`, unless it is there already.
    void load_keys(int64_t first_key) {
        const int64_t head_kv = head.head / args.group;
        block = first_key;
        block_keys = smaller(at.block, key_end - block);
        if (packed_sequence == head.sequence && packed_head == head_kv && packed_block == block)
            return;
        packed_sequence = head.sequence;
        packed_head = head_kv;
        packed_block = block;
        finite_keys = true;
        for (int64_t k = 0; k < block_keys; k += block_kv)
            load_key_tile(head_kv, k, smaller(block_kv, block_keys - k));
    }

    void load_key_tile(int64_t head_kv, int64_t from, int64_t count) {
        const char *k_rows[block_kv], *v_rows[block_kv];
        for (int64_t k = 0; k < count; ++k) {
            k_rows[k] = key_row<const char>(args.key, *sequence, 0, head_kv, block + from + k);
            v_rows[k] = key_row<const char>(args.value, *sequence, 0, head_kv, block + from + k);
        }
        int64_t stride = args.key.stride_channel;
        if (args.rotary.keys) {
            rotate_rows(args.types.key, k_rows, count, stride,
                        [&](int64_t k) { return block + from + k; });
            stride = 1;
        }
        const int64_t padded = padded_rows<S>(count);
        for (int64_t k = 0; k < padded; k += S::mr) {
            const int64_t height = smaller(S::mr, padded - k);
            float* group = memory + at.keys + (from + k) * at.depth;
            pack(args.types.key, k_rows + k, count - k, stride, height, height, args.head_dim,
                 group);
            if (args.qv.data)
                pack(args.types.value, v_rows + k, count - k, args.value.stride_channel, height,
                     height, args.head_dim_v, group + at.key_depth * height);
            pack(args.types.value, v_rows + k, count - k, args.value.stride_channel, height, height,
                 args.head_dim_v, memory + at.values + (from + k) * at.value_depth);
        }
        if (!task.dquery) return;
        float* panel = memory + at.key_rows + from / E * at.key_pitch;
        finite_keys &= pack_row_panels<S, U>(args.types.key, k_rows, count, stride, block_kv,
                                             args.head_dim, panel);
        if (args.qv.data)
            finite_keys &=
                pack_row_panels<S, U>(args.types.value, v_rows, count, args.value.stride_channel,
                                      block_kv, args.head_dim_v, panel + at.qv_at * block_kv / E);
    }

    static void pack(ElementType type, const char* const* from, int64_t count, int64_t stride,
                     int64_t height, int64_t pitch, int64_t channels, float* to) {
        with_units<S, U>(type, [&](auto units) {
            pack_transposed<S, decltype(units)>(from, count, stride, height, pitch, channels, to);
        });
    }

    /// Rotates rows by the angles of position(i), and points to the result.
    template <class Position>
    void rotate_rows(ElementType type, const char** from, int64_t count, int64_t stride,
                     Position&& position) const {
        char* rotated = reinterpret_cast<char*>(memory + at.rotated);
        const int64_t size = args.head_dim * size_of(type);
        for (int64_t i = 0; i < count; ++i, rotated += size) {
            rotate_row_of<S, AnyUnits<S>>(type, args.rotary, from[i], stride, args.head_dim,
                                          position(i), rotated);
            from[i] = rotated;
        }
    }

    int64_t position_of_query(int64_t i) const {
        return sequence->position_q + (args.rotary.advances ? i : 0);
    }

    /// Packs the tile of queries that begins at `first_query`, and their dO.
    void load_queries(int64_t first_query) {
        row = first_query;
        const int64_t count = smaller(query_tile, query_end - row);
        const char *q_rows[query_tile], *qv_rows[query_tile], *do_rows[query_tile];
        for (int64_t i = 0; i < count; ++i) {
            q_rows[i] = query_row<const char>(args.query, *sequence, head.head, row + i);
            do_rows[i] = query_row<const char>(args.dout, *sequence, head.head, row + i);
            if (args.qv.data)
                qv_rows[i] = query_row<const char>(args.qv, *sequence, head.head, row + i);
        }
        int64_t stride = args.query.stride_channel;
        if (args.rotary.element != ElementType::none) {
            rotate_rows(args.types.query, q_rows, count, stride,
                        [&](int64_t i) { return position_of_query(row + i); });
            stride = 1;
        }
        for (int64_t i = 0; i < rounded_up(count, N); i += W) {
            const int64_t panel = i / N, lane = i % N;
            const int64_t left = count > i ? count - i : 0;
            float* query = memory + at.queries + panel * at.depth * N + lane;
            pack(args.types.query, q_rows + i, left, stride, W, N, args.head_dim, query);
            if (args.qv.data)
                pack(args.types.query, qv_rows + i, left, args.qv.stride_channel, W, N,
                     args.head_dim_v, query + at.key_depth * N);
            pack(args.types.dout, do_rows + i, left, args.dout.stride_channel, W, N,
                 args.head_dim_v, memory + at.douts + panel * at.value_depth * N + lane);
        }
        if (task.dkey) {
            float* panel = memory + at.query_rows;
            finite_queries = pack_row_panels<S, U>(args.types.query, q_rows, count, stride,
                                                   query_tile, args.head_dim, panel);
            if (args.qv.data)
                finite_queries &= pack_row_panels<S, U>(
                    args.types.query, qv_rows, count, args.qv.stride_channel, query_tile,
                    args.head_dim_v, panel + at.qv_at * query_tile / E);
            finite_douts =
                pack_row_panels<S, U>(args.types.dout, do_rows, count, args.dout.stride_channel,
                                      query_tile, args.head_dim_v, memory + at.dout_rows);
        }
        const int64_t from = statistics_at(args, head) + row;
        for (int64_t p = 0; p < panels; ++p) {
            rows[p].pivot = args.pivot + from + p * N;
            rows[p].pivot_low = args.pivot_low + from + p * N;
            rows[p].delta = args.delta + from + p * N;
        }
    }

    /// Finds the groups of the tile of keys that each panel computes. False if there are none.
    bool find_groups(int64_t first_key) {
        tile = first_key;
        keys = smaller(block_kv, block + block_keys - tile);
        const int64_t padded = padded_rows<S>(keys);
        union_first = padded;
        union_last = 0;
        for (int64_t p = 0; p < panels; ++p) {
            first[p] = last[p] = 0;
            const int64_t i0 = row + p * N, i1 = smaller(i0 + N, query_end) - 1;
            if (i0 >= query_end) continue;
            const KeyRange some = seen_by_some(sequence->visible, i0, i1, tile, keys);
            if (some.begin >= some.end) continue;
            first[p] = some.begin / S::mr * S::mr;
            last[p] = smaller(rounded_up(some.end, S::mr), padded);
            union_first = smaller(first[p], union_first);
            union_last = last[p] > union_last ? last[p] : union_last;
        }
        return union_first < union_last;
    }

    /// Panel p of P^T, of what is kept of it, or of dS^T. All panels share one place, if the products
    /// with dO and Q take others.
    float* floats_of_panel(int64_t p, int64_t floats) const {
        return memory + floats + (E == 1 ? p * block_kv * N : 0);
    }
    /// Panel p of what multiplies dO, Q or K.
    float* factors_of_panel(int64_t p, int64_t factors) const {
        return memory + factors + p * block_kv * N / E;
    }
    Factors value_factors(int64_t p) const {
        return {nullptr, task.dkey ? factors_of_panel(p, at.value_factors) : nullptr, nullptr};
    }
    Factors score_factors(int64_t p) const {
        return {nullptr, task.dkey ? factors_of_panel(p, at.key_factors) : nullptr,
                task.dquery ? factors_of_panel(p, at.query_factors) : nullptr};
    }
    /// Those of the key k of a tile.
    static Factors from_key(const Factors& to, int64_t k) {
        const auto own = [&](float* at, int64_t pitch) { return at ? at + k * pitch : nullptr; };
        return {own(to.floats, N), own(to.by_query, N / E), own(to.by_key, N / E)};
    }

    /// Rounds P^T or dS^T of panel p to factors.
    void round_panel(int64_t p, const float* from, const Factors& to) const {
        constexpr int NV = S::nv, step = row_step<S>;
        for (int64_t k = first[p]; k < last[p]; k += step) {
            typename S::vf x[step][NV];
            for (int m = 0; m < step; ++m)
                for (int n = 0; n < NV; ++n) x[m][n] = S::load(from + ((k + m) * NV + n) * W);
            store_factors<S, P>(x, from_key(to, k));
        }
    }

    /// Zeros in the groups that another panel computes and this one does not.
    void fill_rest(int64_t p, float* factors) const {
        constexpr int64_t pitch = N / E;
        const int64_t behind = last[p] > union_first ? last[p] : union_first;
        for (int64_t i = union_first * pitch; i < first[p] * pitch; ++i) factors[i] = 0;
        for (int64_t i = behind * pitch; i < union_last * pitch; ++i) factors[i] = 0;
    }

    /// Calls f(key, Constant<height>{}) for the groups of panel p.
    template <class F>
    void for_each_group(int64_t from, int64_t to, F&& f) const {
        for (int64_t k = from; k < to; k += S::mr)
            with_height<S>(smaller(S::mr, to - k), [&](auto height) { f(k, height); });
    }

    /// P^T of panel p, and with dropout what is kept of it.
    void probability_tile(int64_t p) {
        float* probabilities = floats_of_panel(p, at.probabilities);
        const bool drops = at.kept != at.probabilities;
        Factors to = drops ? Factors{} : value_factors(p);
        to.floats = probabilities;
        const int64_t i0 = row + p * N, i1 = smaller(i0 + N, query_end) - 1;
        const KeyRange all = seen_by_all(sequence->visible, i0, i1, tile, keys);
        const float* bias = nullptr;
        if (args.mask.element != ElementType::none) {
            mask_panel<S>(args.mask, head.sequence, head.head, i0, query_end - i0, tile, first[p],
                          smaller(last[p], keys), memory + at.bias);
            bias = memory + at.bias;
        }
        set_visible_rows(sequence->visible, i0, tile, keys, rows[p].visible);
        const int32_t diagonal = diagonal_of(*sequence, i0, tile);
        const float* query = memory + at.queries + p * at.depth * N;
        for_each_group(first[p], last[p], [&](int64_t k, auto height) {
            constexpr int MR = decltype(height)::value;
            const bool masked = k < all.begin || k + MR > all.end;
            const auto run = scoring.plain ? (masked ? probabilities_of<S, P, true, true, MR>
                                                     : probabilities_of<S, P, false, true, MR>)
                                           : (masked ? probabilities_of<S, P, true, false, MR>
                                                     : probabilities_of<S, P, false, false, MR>);
            run(scoring, memory + at.keys + (tile - block + k) * at.depth, query, at.depth,
                static_cast<int32_t>(k), diagonal, bias ? bias + k * N : nullptr, rows[p],
                from_key(to, k), memory + at.caps + k * N);
        });
        if (drops) {
            float* kept = floats_of_panel(p, at.kept);
            for (int64_t i = first[p] * N; i < last[p] * N; i += W)
                S::store(kept + i, S::load(probabilities + i));
            drop_panel<S, FloatUnits<S, F32>>(args.dropout, head.sequence, head.head, i0, tile,
                                              first[p], last[p], kept);
            if constexpr (E > 1) round_panel(p, kept, value_factors(p));
        }
        if (task.dkey) fill_rest(p, factors_of_panel(p, at.value_factors));
    }

    /// dS^T of panel p, and what is summed of it.
    void gradient_tile(int64_t p) {
        const float* probabilities = floats_of_panel(p, at.probabilities);
        const float* kept = floats_of_panel(p, at.kept);
        float* gradients = floats_of_panel(p, at.gradients);
        const bool drops = kept != probabilities;
        // Rounded at once, unless something else takes floats or changes them first.
        const bool floats = E == 1 || task.dmask.data || task.dslopes || args.softcap != 0;
        Factors to = floats ? Factors{} : score_factors(p);
        if (floats) to.floats = gradients;
        const float* dout = memory + at.douts + p * at.value_depth * N;
        for_each_group(first[p], last[p], [&](int64_t k, auto height) {
            constexpr int MR = decltype(height)::value;
            (drops ? score_gradients_of<S, P, true, MR>
                   : score_gradients_of<S, P, false, MR>)(memory + at.values +
                                                              (tile - block + k) * at.value_depth,
                                                          dout, at.value_depth, rows[p].delta,
                                                          probabilities + k * N, kept + k * N,
                                                          1.f / args.dropout.kept, from_key(to, k));
        });
        if (task.dmask.data && !task.sums_mask)
            write_mask(task.dmask, head, row + p * N, smaller(N, query_end - row - p * N), tile,
                       first[p], smaller(last[p], keys), gradients);
        if (task.sums_mask) add_to_mask(p, gradients);
        if (task.dslopes) add_to_slopes(p, gradients);
        if (args.softcap != 0)
            for (int64_t i = first[p] * N; i < last[p] * N; i += W) {
                const typename S::vf d = S::load(gradients + i);
                // Of hidden keys the derivative may be NaN.
                S::store(gradients + i,
                         d == 0.f ? typename S::vf{} : d * S::load(memory + at.caps + i));
            }
        if constexpr (E > 1)
            if (floats) round_panel(p, gradients, score_factors(p));
        if (task.dkey) fill_rest(p, factors_of_panel(p, at.key_factors));
    }

    void add_to_mask(int64_t p, const float* gradients) const {
        const int64_t keys_in_all =
            rounded_up(at.longest(args, task, true) - task.key_begin, block_kv);
        const int64_t pitch = (task.dmask.stride_key ? keys_in_all : 1) * N;
        float* to = memory + at.dmask;
        if (task.dmask.stride_row) to += ((row - task.query_begin) / N + p) * pitch;
        for (int64_t k = first[p]; k < last[p]; ++k) {
            float* own = to + (task.dmask.stride_key ? tile - task.key_begin + k : 0) * N;
            for (int64_t n = 0; n < N; n += W)
                S::store(own + n, S::load(own + n) + S::load(gradients + k * N + n));
        }
    }

    void add_to_slopes(int64_t p, const float* gradients) {
        const int32_t diagonal = diagonal_of(*sequence, row + p * N, tile);
        for (int64_t k = first[p]; k < last[p]; ++k)
            for (int n = 0; n < S::nv; ++n)
                slope_sum -= S::load(gradients + k * N + n * W) *
                             distance_of<S>(diagonal + n * W - static_cast<int32_t>(k));
    }

    /// dQ += dS K of panel p.
    void add_to_queries(int64_t p) const {
        const int64_t depth = last[p] - first[p];
        if (depth <= 0) return;
        const int64_t offset = row - task.query_begin + p * N;
        float* to = memory + at.dquery + (index * at.query_count + offset) * at.key_pitch;
        const float* key_rows =
            memory + at.key_rows + (tile - block) / E * at.key_pitch + first[p] / E * N;
        const Runs runs{1, depth / E, 0, N};
        for (int64_t q = 0; q < N; q += S::mr) {
            const float* factors = factors_of_panel(p, at.query_factors) + first[p] / E * N + q;
            const int64_t count = smaller(S::mr, N - q);
            add_rows<S, P, true>(count, factors, runs, key_rows, block_kv / E * N, finite_keys,
                                 args.head_dim, to + q * at.key_pitch, at.key_pitch);
            if (args.qv.data)
                add_rows<S, P, true>(count, factors, runs, key_rows + at.qv_at * block_kv / E,
                                     block_kv / E * N, finite_keys, args.head_dim_v,
                                     to + q * at.key_pitch + at.qv_at, at.key_pitch);
        }
    }

    /// dV += P^T dO and dK += dS^T Q.
    void add_to_keys() const {
        for (int64_t k = union_first; k < union_last; k += S::mr) {
            const int64_t count = smaller(S::mr, union_last - k);
            int64_t begin = panels, end = 0;
            for (int64_t p = 0; p < panels; ++p)
                if (first[p] < k + count && last[p] > k) {
                    begin = smaller(begin, p);
                    end = p + 1;
                }
            if (begin >= end) continue;
            const Runs runs{end - begin, N / E, block_kv * N / E, 1};
            const int64_t key = tile - block + k, from = begin * N / E * N;
            const int64_t panel = query_tile / E * N, own = k * N / E;
            if (args.dvalue.data)
                add_rows<S, P, false>(count, factors_of_panel(begin, at.value_factors) + own, runs,
                                      memory + at.dout_rows + from, panel, finite_douts,
                                      args.head_dim_v, memory + at.dvalue + key * at.value_pitch,
                                      at.value_pitch);
            const float* factors = factors_of_panel(begin, at.key_factors) + own;
            float* to = memory + at.dkey + key * at.key_pitch;
            const float* query_rows = memory + at.query_rows + from;
            if (args.dkey.data)
                add_rows<S, P, false>(count, factors, runs, query_rows, panel, finite_queries,
                                      args.head_dim, to, at.key_pitch);
            if (args.qv.data && args.dvalue.data)
                add_rows<S, P, false>(count, factors, runs, query_rows + at.qv_at * query_tile / E,
                                      panel, finite_queries, args.head_dim_v, to + at.qv_at,
                                      at.key_pitch);
        }
    }

    /// Writes dK and dV of the block.
    void store_keys() const {
        const int64_t head_kv = head.head / args.group;
        const float share = 1.f / args.dropout.kept;
        for (int64_t k = 0; k < block_keys; ++k) {
            float* dkey = memory + at.dkey + k * at.key_pitch;
            float* dvalue = memory + at.dvalue + k * at.value_pitch;
            if (args.dkey.data) {
                if (args.rotary.keys) rotate<S, true>(args.rotary, block + k, dkey);
                store_gradient<S>(args.types.dkey, dkey, args.gradient_scale, args.head_dim,
                                  key_row<char>(args.dkey, *sequence, 0, head_kv, block + k),
                                  args.dkey.stride_channel);
            }
            if (!args.dvalue.data) continue;
            if (args.qv.data)
                for (int64_t c = 0; c < args.head_dim_v; c += W)
                    S::store(dvalue + c, S::load(dvalue + c) * share +
                                             S::load(dkey + at.qv_at + c) * args.gradient_scale);
            store_gradient<S>(args.types.dvalue, dvalue, args.qv.data ? 1.f : share,
                              args.head_dim_v,
                              key_row<char>(args.dvalue, *sequence, 0, head_kv, block + k),
                              args.dvalue.stride_channel);
        }
    }

    /// Writes dQ of every head of the task.
    void store_queries() {
        for (int64_t i = 0; i < task.head_count; ++i) {
            start_head(i);
            for (int64_t q = task.query_begin; q < query_end; ++q) {
                float* own =
                    memory + at.dquery + (i * at.query_count + q - task.query_begin) * at.key_pitch;
                if (args.rotary.element != ElementType::none)
                    rotate<S, true>(args.rotary, position_of_query(q), own);
                if (args.dquery.data)
                    store_gradient<S>(args.types.dquery, own, args.gradient_scale, args.head_dim,
                                      query_row<char>(args.dquery, *sequence, head.head, q),
                                      args.dquery.stride_channel);
                if (args.dqv.data)
                    store_gradient<S>(args.types.dqv, own + at.qv_at, args.gradient_scale,
                                      args.head_dim_v,
                                      query_row<char>(args.dqv, *sequence, head.head, q),
                                      args.dqv.stride_channel);
            }
        }
    }

    /// Writes gradients of `count` rows of a mask from `scores`, [key][lane], for the keys
    /// [first_key, last_key) of a tile.
    static void write_mask(const Mask& mask, const SequenceHead& own, int64_t query, int64_t count,
                           int64_t first_tile_key, int64_t first_key, int64_t last_key,
                           const float* scores) {
        with_units<S, AnyUnits<S>>(mask.element, [&](auto units) {
            using T = typename decltype(units)::type;
            using storage = typename T::storage;
            for (int64_t k = first_key; k < last_key; k += W)
                for (int64_t n = 0; n < N && n < count; n += W) {
                    typename S::vf x[W];
                    for (int i = 0; i < W; ++i)
                        x[i] =
                            k + i < last_key ? S::load(scores + (k + i) * N + n) : typename S::vf{};
                    S::transpose(x);
                    const int64_t keys_left = smaller(W, last_key - k);
                    for (int r = 0; r < W && n + r < count; ++r) {
                        auto* to = reinterpret_cast<storage*>(const_cast<char*>(mask_at(
                            mask, own.sequence, own.head, query + n + r, first_tile_key + k)));
                        if (keys_left == W && mask.stride_key == 1) {
                            T::template store<S>(to, x[r]);
                            continue;
                        }
                        storage buffer[W];
                        T::template store<S>(buffer, x[r]);
                        for (int64_t i = 0; i < keys_left; ++i) to[i * mask.stride_key] = buffer[i];
                    }
                }
        });
    }

    /// Writes the gradient of the mask that all heads have added to.
    void store_mask() const {
        const Mask& mask = task.dmask;
        const SequenceHead& one = task.heads[0];
        const int64_t rows_in_all =
            mask.stride_row ? at.longest(args, task, false) - task.query_begin : 1;
        const int64_t own_keys =
            mask.stride_key ? at.longest(args, task, true) - task.key_begin : 1;
        const int64_t pitch = mask.stride_key ? rounded_up(own_keys, block_kv) : 1;
        float* const sums = memory + at.dmask;
        if (!mask.stride_row)  // the first lane gets them all
            for (int64_t k = 0; k < own_keys; ++k)
                for (int64_t n = 1; n < N; ++n) sums[k * N] += sums[k * N + n];
        for (int64_t q = 0; q < rows_in_all; q += N)
            write_mask(mask, one, task.query_begin + q, smaller(N, rows_in_all - q), task.key_begin,
                       0, own_keys, sums + q * pitch);
    }
};

template <class S, class U>
void backward_run(const BackwardArgs& args, const BackwardTask& task, float* scratch) {
    BackwardWork<S, U> work(args, task, scratch);
    const BackwardScratch<S, U>& at = work.at;
    constexpr int64_t panels = BackwardWork<S, U>::panels, query_tile = queries_of_tile<U>;
    if (task.dquery) work.clear(at.dquery, task.head_count * at.query_count * at.key_pitch);
    const int64_t last_key = at.longest(args, task, true);
    if (task.sums_mask) work.clear(at.dmask, at.mask_floats(task, last_key));
    const bool wants_gradients = work.wants_gradients();
    for (int64_t block = task.key_begin; block < last_key; block += at.block) {
        if (task.dkey) work.clear(at.dkey, at.block * at.key_pitch);
        if (task.dkey) work.clear(at.dvalue, at.block * at.value_pitch);
        for (int64_t i = 0; i < task.head_count; ++i) {
            work.start_head(i);
            if (block >= work.key_end) continue;
            const int64_t keys = smaller(at.block, work.key_end - block);
            for (int64_t row = task.query_begin; row < work.query_end; row += query_tile) {
                const int64_t end = smaller(row + query_tile, work.query_end);
                if (!work.touched(row, end, block, keys)) continue;
                work.load_keys(block);
                work.load_queries(row);
                for (int64_t tile = block; tile < block + keys; tile += block_kv) {
                    if (!work.find_groups(tile)) continue;
                    for (int64_t p = 0; p < panels; ++p) {
                        if (row + p * work.N >= work.query_end) continue;
                        work.probability_tile(p);
                        if (!wants_gradients) continue;
                        work.gradient_tile(p);
                        if (task.dquery) work.add_to_queries(p);
                    }
                    if (task.dkey) work.add_to_keys();
                }
            }
            if (task.dslopes) {
                float sum = 0;
                for (int n = 0; n < S::W; ++n) sum += work.slope_sum[n];
                task.dslopes[i * task.dslopes_pitch + block / at.block] = sum;
            }
        }
        if (task.dkey && work.packed_block != block) {  // no query sees it
            work.start_head(0);
            work.block = block;
            work.block_keys = smaller(at.block, work.key_end - block);
        }
        if (task.dkey) work.store_keys();
    }
    if (task.dquery) work.store_queries();
    if (task.sums_mask) work.store_mask();
}

template <class S, class U>
int64_t backward_scratch_floats(const BackwardArgs& args, const BackwardTask& task) {
    return BackwardScratch<S, U>(args, task).size;
}

template <class S, class U>
int64_t backward_key_block(const BackwardArgs& args) {
    return BackwardScratch<S, U>(args).block;
}

}  // namespace
}  // namespace umfa::cpu
