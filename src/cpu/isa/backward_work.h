// What one task of a backward pass does with a tile of queries and a block of keys.
#pragma once

#include "cpu/isa/backward_mask.h"
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
    float* const dquery;  // of all heads of the task

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
        : args(all_args),
          task(all_task),
          at(all_args, all_task),
          memory(scratch),
          dquery(all_task.shared ? all_task.shared->dquery : scratch + at.dquery) {}

    static void clear(float* from, int64_t floats) {
        for (int64_t i = 0; i < floats; ++i) from[i] = 0;
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

    /// Whether some query of the tile that begins at `first_query` sees a key of the block.
    bool touched(int64_t first_query, int64_t first_key) const {
        const int64_t end = smaller(first_query + query_tile, query_end);
        const int64_t count = smaller(at.block, key_end - first_key);
        if (first_query >= end || count <= 0) return false;
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

    /// Fetches the part that belongs to the group k of panel p of the mask that is read after it.
    UMFA_INLINE void fetch_mask_after(int64_t p, int64_t k) const {
        const int64_t begin = first[p], end = last[p];
        int64_t from = row + (p + 1) * N, key = tile;
        if (p + 1 == panels || from >= query_end) {
            const bool ends = tile + block_kv >= block + block_keys;
            from = ends ? row + query_tile : row;
            key = ends ? block : tile + block_kv;
        }
        const int64_t count = smaller(N, query_end - from), size = end - begin;
        if (count <= 0) return;
        fetch_mask(args.mask, head.sequence, head.head, from + count * (k - begin) / size,
                   from + count * smaller(k + S::mr - begin, size) / size, key, block_kv);
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
            if (bias) fetch_mask_after(p, k);
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
            write_mask<S>(task.dmask, head, row + p * N, smaller(N, query_end - row - p * N), tile,
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

    /// The sums of the mask's gradient, and the keys of one of their panels.
    float* mask_sums() const {
        return task.shared ? task.shared->dmask + index * task.shared->dmask_head
                           : memory + at.dmask;
    }
    int64_t keys_of_mask() const {
        return task.shared ? at.block
                           : rounded_up(at.longest(args, task, true) - task.key_begin, block_kv);
    }

    void add_to_mask(int64_t p, const float* gradients) const {
        const int64_t pitch = (task.dmask.stride_key ? keys_of_mask() : 1) * N;
        float* to = mask_sums();
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
        float* to = dquery + (index * at.query_count + offset) * at.key_pitch;
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

    float* sums_of_query(int64_t q) const {
        return dquery + (index * at.query_count + q - task.query_begin) * at.key_pitch;
    }

    /// Writes dQ of the queries [first_query, end) of this head.
    void store_queries(int64_t first_query, int64_t end) const {
        for (int64_t q = first_query; q < end; ++q) {
            float* own = sums_of_query(q);
            if (args.rotary.element != ElementType::none)
                rotate<S, true>(args.rotary, position_of_query(q), own);
            if (args.dquery.data)
                store_gradient<S>(args.types.dquery, own, args.gradient_scale, args.head_dim,
                                  query_row<char>(args.dquery, *sequence, head.head, q),
                                  args.dquery.stride_channel);
            if (args.dqv.data)
                store_gradient<S>(
                    args.types.dqv, own + at.qv_at, args.gradient_scale, args.head_dim_v,
                    query_row<char>(args.dqv, *sequence, head.head, q), args.dqv.stride_channel);
        }
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
            write_mask<S>(mask, one, task.query_begin + q, smaller(N, rows_in_all - q),
                          task.key_begin, 0, own_keys, sums + q * pitch);
    }

    // ---- sums that tasks share -------------------------------------------------------------------

    float* mask_sums_of(int64_t q) const { return mask_sums() + q / N * keys_of_mask() * N; }

    /// Waits until the tile of queries is this task's, and clears the sums that begin here.
    void begin_turn(int64_t first_query, int64_t step) const {
        const SharedSums& shared = *task.shared;
        shared.wait(shared.context, step);
        if (shared.first_keys && task.dquery && first_query < query_end)
            clear(sums_of_query(first_query), query_tile * at.key_pitch);
        if (shared.first_heads && (shared.dmask_head || index == 0))
            clear(mask_sums_of(first_query), query_tile * keys_of_mask());
    }

    /// Writes the sums that end here, and gives the tile to the next task.
    void end_turn(int64_t first_query, int64_t step) const {
        const SharedSums& shared = *task.shared;
        if (shared.last_keys && task.dquery)
            store_queries(first_query, smaller(first_query + query_tile, query_end));
        if (shared.last_heads && (shared.dmask_head || index + 1 == task.head_count)) {
            const int64_t end = smaller(first_query + query_tile, task.query_end);
            for (int64_t q = first_query; q < end; q += N)
                write_mask<S>(task.dmask, head, q, smaller(N, end - q), task.key_begin, 0,
                              task.key_end - task.key_begin, mask_sums_of(q));
        }
        shared.finish(shared.context, step);
    }
};

}  // namespace
}  // namespace umfa::cpu
