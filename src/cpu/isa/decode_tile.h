// The keys or values of one tile of decoding, a vector at a time, where they lie in memory: numbers, or
// the codes of a quantised format. decode_kernel.h multiplies either in the same loops.
#pragma once

#include "cpu/isa/codes.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

constexpr int64_t decode_tile = 32;  // keys per softmax step

/// The rows of a tile's keys: where they are, and where those of the next tile are.
struct TileRows {
    const void *now[decode_tile], *next[decode_tile];  // next: null past the last
};

/// Numbers, as units of U.
template <class S, class U>
struct NumberTile {
    using Units = U;
    using Row = const typename U::storage*;
    using vf = typename S::vf;
    static constexpr int W = S::W;

    const TileRows& rows;
    const Rows& layout;
    int64_t channels;

    UMFA_INLINE Row row(int64_t k) const { return static_cast<Row>(rows.now[k]); }
    /// How many vectors of units whole() takes; part() takes all.
    int64_t whole_vectors() const { return layout.stride_channel == 1 ? channels / (W * U::E) : 0; }
    UMFA_INLINE vf whole(Row row, int64_t i) const { return U::from_row(row + i * W * U::E); }
    vf part(Row row, int64_t i) const {
        return row_units<S, U>(row, layout.stride_channel, i * W, channels);
    }
    /// Vectors i and i + 1 of floats, in the order that is cheapest: see in_order().
    UMFA_INLINE void two(Row row, int64_t i, vf& a, vf& b) const {
        U::type::template load_two<S>(row + i * W, a, b);
    }
    static UMFA_INLINE void in_order(vf& a, vf& b) { U::type::template in_order<S>(a, b); }
    /// Prefetches channels [first, first + count) of the next tile's row.
    UMFA_INLINE void prefetch(int64_t k, int64_t first, int64_t count) const {
        if (rows.next[k]) prefetch_row(static_cast<Row>(rows.next[k]) + first, layout, count);
    }
};

/// Codes of a quantised format whose blocks are whole vectors. The scales of neighbouring blocks lie
/// decode_tile floats apart.
template <class S, class C>
struct CodeTile {
    using Units = FloatUnits<S, F32>;
    using vf = typename S::vf;
    static constexpr int W = S::W;
    struct Row {
        const uint8_t* codes;
        const float* scales;
    };

    const TileRows& rows;
    const float* scales;
    CodeReader<S, C, false> reader;
    int64_t channels = reader.layout.channels;
    int64_t bytes = reader.place((channels - 1) / W).byte + W;  // about

    UMFA_INLINE Row row(int64_t k) const {
        return {static_cast<const uint8_t*>(rows.now[k]), scales + k};
    }
    int64_t whole_vectors() const { return channels / W; }
    UMFA_INLINE vf whole(Row row, int64_t i) const {
        return reader.whole(row.codes, row.scales, i);
    }
    vf part(Row row, int64_t i) const { return reader.part(row.codes, row.scales, i); }
    UMFA_INLINE void two(Row row, int64_t i, vf& a, vf& b) const {
        a = whole(row, i);
        b = whole(row, i + 1);
    }
    static UMFA_INLINE void in_order(vf&, vf&) {}
    /// The whole row, for the first channels.
    UMFA_INLINE void prefetch(int64_t k, int64_t first, int64_t) const {
        const char* row = static_cast<const char*>(rows.next[k]);
        if (first != 0 || !row) return;
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
};

/// The scales of a tile's keys, which begin at `first`. `rows`: their codes.
template <class S>
inline void scales_of_tile(const ForwardArgs& args, const Codes& codes, const CodeLayout<S>& layout,
                           const Sequence& sequence, int64_t head, int64_t first, int64_t keys,
                           const TileRows& rows, float* memory) {
    const Scales scales{codes,  layout.first_block, layout.blocks,
                        memory, decode_tile,        decode_tile * layout.blocks};
    const auto place = [&](int64_t k) {
        return scale_place(codes, key_place(sequence, args.page_size, first + k));
    };
    const bool in_order = codes.scales && !sequence.pages;
    if (in_order && codes.block_rows == 1) {
        scales.add_rows(keys, place(0), head);
    } else if (in_order && place(0) == place(keys - 1)) {
        scales.add(0, place(0), head, nullptr);
        return scales.finish_same(keys);
    } else {
        for (int64_t k = 0; k < keys; ++k)
            scales.add(k, place(k), head, static_cast<const uint8_t*>(rows.now[k]));
    }
    scales.finish(keys);
}

}  // namespace
}  // namespace umfa::cpu
