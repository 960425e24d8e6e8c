// Sizes of the tiles of a backward pass, and the scratch of its tasks.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/product.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

constexpr int64_t statistics_step = 64;  // rows of statistics of a head are a multiple of it
/// Queries of a tile. The sums of dK and dV are read and written once a tile: with products that take half
/// the time, twice as many queries save 3 %.
template <class U>
constexpr int64_t queries_of_tile = U::E == 1 ? 64 : 128;

inline int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// Sizes and places of a task's scratch, in floats. N: lanes of a panel of queries, and channels of a
/// panel of rows.
template <class S, class U>
struct BackwardScratch {
    static constexpr int64_t query_tile = queries_of_tile<U>;
    static constexpr int64_t N = S::nv * S::W, panels = query_tile / N, slack = 64, E = U::E;
    int64_t key_depth, value_depth;  // units of Q.K and of dO.V
    int64_t depth;                   // of Q.K with those of QV.V
    int64_t key_pitch, value_pitch;  // of a row of dQ and dK, and of dV: whole panels
    int64_t qv_at;                   // where the channels of QV begin in a row of dQ
    int64_t block;                   // keys
    int64_t keys, key_rows, values;  // of a block
    int64_t queries, query_rows, douts, dout_rows;  // of a tile
    int64_t probabilities, kept, gradients, caps, bias;
    // What multiplies dO, Q and K: units of queries for dV and dK, of keys for dQ. Of floats, these are
    // the arrays above.
    int64_t value_factors, key_factors, query_factors;
    int64_t dquery, dkey, dvalue, dmask, rotated, size;
    int64_t query_count;  // rows of dquery of one head

    explicit BackwardScratch(const BackwardArgs& args) {
        static_assert(block_kv % E == 0 && N % E == 0 && row_step<S> % E == 0);
        key_depth = units_of(args.head_dim);
        value_depth = units_of(args.head_dim_v);
        qv_at = rounded_up(args.head_dim, N);
        value_pitch = rounded_up(args.head_dim_v, N);
        depth = key_depth + (args.qv.data ? value_depth : 0);
        key_pitch = qv_at + (args.qv.data ? value_pitch : 0);
        // What a key takes, in a block that should stay in the L2 cache beside a tile of queries.
        constexpr int64_t floats = 192 * 1024;
        const int64_t own = depth + value_depth + key_pitch / E + key_pitch + value_pitch;
        const int64_t tiles = floats / (own * block_kv);
        block = block_kv * (tiles < 1 ? 1 : tiles > 8 ? 8 : tiles);
    }

    BackwardScratch(const BackwardArgs& args, const BackwardTask& task) : BackwardScratch(args) {
        const int64_t last = longest(args, task, false), last_key = longest(args, task, true);
        query_count = last > task.query_begin ? rounded_up(last - task.query_begin, query_tile) : 0;
        const int64_t tile = block_kv * query_tile;
        int64_t end = 0;
        const auto place = [&](int64_t floats) {
            const int64_t at = end;
            end += rounded_up(floats, 16);
            return at;
        };
        keys = place(block * depth + slack);
        key_rows = place(block * key_pitch / E);
        values = place(block * value_depth + slack);
        queries = place(query_tile * depth + slack);
        query_rows = place(query_tile * key_pitch / E);
        douts = place(query_tile * value_depth + slack);
        dout_rows = place(query_tile * value_pitch / E);
        const int64_t numbers = E == 1 ? tile : block_kv * N;  // with factors, one panel's
        probabilities = place(numbers);
        kept = args.dropout.threshold ? place(numbers) : probabilities;
        gradients = place(numbers);
        value_factors = E == 1 ? kept : place(tile / E);
        key_factors = E == 1 ? gradients : place(tile / E);
        query_factors = E == 1 ? gradients : place(tile / E);
        caps = place(args.softcap != 0 ? block_kv * N : 0);
        const bool has_mask = args.mask.element != ElementType::none;
        bias = place(has_mask ? (block_kv + S::W) * N : 0);
        dquery = place(task.dquery && !task.shared ? task.head_count * query_count * key_pitch : 0);
        dkey = place(task.dkey ? block * key_pitch : 0);
        dvalue = place(task.dkey ? block * value_pitch : 0);
        dmask = place(task.sums_mask && !task.shared ? mask_floats(task, last_key) : 0);
        const int64_t rows = block > query_tile ? block : query_tile;
        rotated = place(args.rotary.element == ElementType::none ? 0 : rows * args.head_dim);
        size = end;
    }

    static int64_t units_of(int64_t elements) { return (elements + E - 1) / E; }
    static int64_t longest(const BackwardArgs& args, const BackwardTask& task, bool keys) {
        int64_t most = 0;
        for (int64_t i = 0; i < task.head_count; ++i) {
            const Sequence& sequence = args.sequences[task.heads[i].sequence];
            const int64_t rows = keys ? sequence.seqlen_kv : sequence.seqlen_q;
            most = rows > most ? rows : most;
        }
        const int64_t end = keys ? task.key_end : task.query_end;
        return smaller(most, end);
    }
    /// The gradient of the mask is kept as [panel][key][lane]; without the dimensions that are summed.
    int64_t mask_floats(const BackwardTask& task, int64_t last_key) const {
        const int64_t rows = task.dmask.stride_row ? query_count : N;
        const int64_t own =
            task.dmask.stride_key ? rounded_up(last_key - task.key_begin, block_kv) : 1;
        return rows * (own > 0 ? own : 0);
    }
};

}  // namespace
}  // namespace umfa::cpu
