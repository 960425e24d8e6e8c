// forward_block() for matrix registers. The same algorithm, but three panels at a time: while the vector
// units take the exponentials of one, the matrix unit adds up the values of the one before and
// multiplies out the scores of the next. O is rescaled in place and is the C of its product, rounded once
// for 32 keys, not once per key, so that 2**24 keys of equal weight still count.
#pragma once

#include "cpu/isa/forward_kernel.h"
#include "cpu/isa/tile_products.h"

namespace umfa::cpu {
namespace {

template <class S, class U>
struct TileBlock : ForwardBlock<S, U> {
    using Base = ForwardBlock<S, U>;
    using Base::args, Base::at, Base::memory, Base::panel, Base::keys, Base::values, Base::scoring;
    using Base::E, Base::N;
    using Q = typename U::scores;
    static_assert(N == 2 * tile_units && S::mr == 2 * tile_units);

    /// A panel on its way through the tile of keys.
    struct Stage {
        int64_t p = -1;  // none
        KeyGroups groups{};
        int buffer = 0;
        bool exists() const { return p >= 0; }
    };

    using Base::Base;

    float* scores_of(const Stage& stage) const {
        return memory + at.scores + stage.buffer * keys_of_tile<U> * N;
    }
    float* probabilities_of(const Stage& stage) const {
        return memory + at.probabilities + stage.buffer * keys_of_tile<U> * N;
    }

    /// Packs the K and V of the tile that begins at `first_key`.
    void load_tile(int64_t first_key) {
        Base::find_tile(first_key);
        const int64_t key_stride = Base::rotate_keys(), value_stride = args.value.stride_channel;
        const int64_t padded = padded_rows<S>(keys), steps = at.depth / tile_units;
        float* const key = memory + at.key;
        if constexpr (Q::quantised) {
            const float* codes[keys_of_tile<U>];
            Base::quantise_keys(key_stride, codes);
            pack_tile_rows<S, FloatUnits<S, F32>>(codes, keys, 1, padded, at.key_depth, steps, key);
        } else {
            pack_tile_rows<S, U>(Base::k_rows, keys, key_stride, padded, args.head_dim, steps, key);
        }
        if (args.qv.data)
            pack_tile_rows<S, U>(Base::v_rows, keys, value_stride, padded, args.head_dim_v, steps,
                                 key + at.key_depth / tile_units * pair_floats);
        values = pack_tile_columns<S, U>(Base::v_rows, keys, value_stride, args.head_dim_v,
                                         at.value_pitch / tile_units, memory + at.value);
    }

    TileProduct scores_product(const Stage& stage) const {
        if (!stage.exists()) return {};
        const int64_t first = stage.groups.first, steps = at.depth / tile_units;
        return {memory + at.key + first * at.depth,
                steps * pair_floats,
                Base::query_of(stage.p),
                scores_of(stage) + first * N,
                (stage.groups.last - first) / tile_units,
                steps,
                true};
    }

    TileProduct sums_product(const Stage& stage) const {
        if (!stage.exists()) return {};
        const int64_t first = stage.groups.first / E / tile_units;
        const int64_t last = stage.groups.last / E / tile_units;
        return {memory + at.value + first * pair_floats,
                at.value_pitch / tile_units * pair_floats,
                probabilities_of(stage) + first * pair_floats,
                Base::out_of(stage.p),
                at.channels / tile_units,
                last - first,
                panel[stage.p].fresh};
    }

    /// Scores of the next panel, probabilities of the current one, sums of the last one.
    void advance(const Stage& last, const Stage& current, const Stage& next) {
        if (last.exists() && !panel[last.p].fresh)
            rescale<S>(panel[last.p], at.channels, Base::out_of(last.p));
        take_exponentials_of(current, scores_product(next), sums_product(last));
        if (last.exists()) {
            panel[last.p].fresh = false;
            if (values.tiny)
                accumulate_left_out<S, U>(Base::v_rows, args.value.stride_channel, keys,
                                          args.head_dim_v, probabilities_of(last),
                                          last.groups.first, last.groups.last,
                                          Base::out_of(last.p));
        }
        if (next.exists()) finish_scores_of(next);
    }

    void take_exponentials_of(const Stage& stage, const TileProduct& first,
                              const TileProduct& second) {
        if (!stage.exists()) {
            multiply<typename S::Tiles, Q>(first, [] {});
            multiply<typename S::Tiles, U>(second, [] {});
            return;
        }
        const KeyGroups& groups = stage.groups;
        const bool open = groups.open_first <= groups.first && groups.last <= groups.open_last;
        const auto take = scoring.plain ? open ? take_exponentials<S, U, true, false>
                                               : take_exponentials<S, U, true, true>
                          : open        ? take_exponentials<S, U, false, false>
                                        : take_exponentials<S, U, false, true>;
        take(scoring, groups, scores_of(stage), probabilities_of(stage), panel[stage.p], first,
             second);
        if (args.dropout.threshold)
            drop_panel<S, U>(args.dropout, Base::batch, Base::head, Base::q_begin + stage.p * N,
                             Base::tile, groups.first, groups.last, probabilities_of(stage));
    }

    void finish_scores_of(const Stage& stage) {
        const KeyGroups& groups = stage.groups;
        const float* bias = Base::mask_tile(stage.p, groups);
        const int64_t row = Base::q_begin + stage.p * N;
        Base::start_tile(stage.p);
        (scoring.plain
             ? finish_tile_scores<S, Q, true>
             : finish_tile_scores<S, Q, false>)(scoring, Base::scales_of(stage.p), groups.first,
                                                groups.last, groups.all.begin, groups.all.end,
                                                diagonal_of(Base::sequence, row, Base::tile), bias,
                                                scores_of(stage), panel[stage.p]);
    }
};

template <class S, class U>
void forward_tiles(const ForwardArgs& args, const Block& block, const Block* next_block,
                   float* scratch) {
    using Work = TileBlock<S, U>;
    Work work(args, block, scratch);
    work.load_queries();
    for (int64_t tile = work.next_tile_from(0), next; tile < work.sequence.seqlen_kv; tile = next) {
        next = work.next_tile_from(tile + keys_of_tile<U>);
        work.load_tile(tile);
        typename Work::Stage last, current;
        int buffer = 0;
        for (int64_t p = 0; p < work.panels; ++p) {
            work.prefetch(p, next, next_block);
            work.fetch_mask_after(p, next, 0, 1);
            const KeyGroups groups = work.groups_of(p);
            if (groups.empty()) continue;
            const typename Work::Stage own{p, groups, buffer ^= 1};
            work.advance(last, current, own);
            last = current;
            current = own;
        }
        for (; last.exists() || current.exists(); last = current, current = {})
            work.advance(last, current, {});
    }
    work.store_rows();
}

}  // namespace
}  // namespace umfa::cpu
