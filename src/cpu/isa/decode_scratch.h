// What a key head of decoding keeps between tiles: where it lies in scratch, and the state of its rows.
#pragma once

#include "core/constants.h"
#include "cpu/isa/decode_tile.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/softmax.h"

namespace umfa::cpu {
namespace {

constexpr int decode_rows = 4;         // rows at a time: 16 accumulators with 4 vectors of channels
constexpr int64_t register_rows = 24;  // see DecodeCodes

/// One row: what it is, and its running maximum.
struct DecodeRow {
    Scoring scoring;
    float maximum;
    int64_t head, query;
};
constexpr int64_t decode_row_floats_of_state = sizeof(DecodeRow) / 4;

/// Room for what a tile's codes become: numbers, or scales and offsets.
inline int64_t decode_code_floats(const Codes& codes, int64_t channels) {
    return codes.given ? decode_tile * channels : 0;
}

/// How quantised keys and values are read. For up to register_rows queries of a key head, codes become
/// numbers in registers, once for decode_rows of them, and memory holds the scales of a tile's rows. For
/// more, and where channels have scales of their own, the numbers of a tile are written out. (int4 in
/// blocks of 32 on Zen 5, ns for a key: 24 instead of 32 with 4 queries, 81 instead of 104 with 16.)
template <class S>
struct DecodeCodes {
    bool key, value;  // in registers
    CodeLayout<S> key_layout, value_layout;

    DecodeCodes(const ForwardArgs& args, int64_t rows)
        : key(fits(args.key_codes, rows) && !args.rotary.keys),
          value(fits(args.value_codes, rows)) {
        if (key) key_layout = {args.key_codes, 0, args.head_dim, decode_tile};
        if (value) value_layout = {args.value_codes, 0, args.head_dim_v, decode_tile};
    }
    static bool fits(const Codes& codes, int64_t rows) {
        return codes.given && rows <= register_rows && codes.block_channels > 1;
    }
};

/// Where the pieces of one key head's scratch begin, in floats; the scores' tile is shared by all.
template <class S, class U>
struct DecodeScratch {
    int64_t numbers, values;  // of quantised keys and values: see DecodeCodes
    int64_t shared;  // the scores of a tile, its keys where they are rotated, both of these
    int64_t rows;    // queries of the heads that share the key head
    int64_t depth, depth_qv;  // units of a row of Q and QV, whole vectors
    int64_t channels;         // of a row of O, likewise
    int64_t query, qv, out, sum, state, size;

    DecodeScratch(const ForwardArgs& args, int64_t seqlen_q) {
        constexpr int64_t W = S::W;
        numbers = decode_rows * decode_tile + (args.rotary.keys ? decode_tile * args.head_dim : 0);
        values = numbers + decode_code_floats(args.key_codes, args.head_dim);
        shared = values + decode_code_floats(args.value_codes, args.head_dim_v);
        rows = args.group * seqlen_q;
        const auto units = [](int64_t elements) {
            return ((elements + U::E - 1) / U::E + W - 1) / W * W;
        };
        depth = units(args.head_dim);
        depth_qv = args.qv.data ? units(args.head_dim_v) : 0;
        channels = (args.head_dim_v + W - 1) / W * W;
        query = 0;                    // [row][depth]: see load_units()
        qv = query + rows * depth;    // [row][depth_qv], likewise
        out = qv + rows * depth_qv;   // [row][channels]
        sum = out + rows * channels;  // [row][W], to be added up
        state = sum + rows * W;       // [row]: DecodeRow
        size = state + (rows * decode_row_floats_of_state + 15) / 16 * 16;
    }
};

}  // namespace
}  // namespace umfa::cpu
