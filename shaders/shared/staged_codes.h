// Tiles of K and V from the codes of a quantised format. Codes become numbers in registers on their way
// into threadgroup memory, where the tile is that of a dequantised tensor of the kernel's type, to the
// bit.
#pragma once

#include <metal_stdlib>

#include "shared/code_kinds.h"
#include "shared/code_rows.h"
#include "shared/key_order.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/quant_format.h"
#include "shared/rotary.h"
#include "shared/sequence.h"
#include "shared/tile.h"

using namespace metal;

namespace umfa {

/// Copies a tile by runs of codes of BITS bits.
template <int BITS, typename M, int D, int ROWS, int THREADS>
UMFA_INLINE void stage_runs(threadgroup M* staged, device const uchar* rows,
                            constant OperandStrides& strides, thread const Codes& codes,
                            CodeKind kind, thread const Pages& pages, int first, int row_count,
                            int columns, ushort thread_index) {
    constexpr int N = UMFA_CODE_RUN, RUNS = D / N, ROW = tile_row<M>(D),
                  STEPS = 1 + (ROWS * RUNS - 1) / THREADS, WORDS = N * BITS / 32,
                  STORED = 16 / sizeof(M);
    // All loads are under way before the first is used.
    uint words[STEPS][WORDS];
    CodeRow at[STEPS];
    float scale[STEPS], offset[STEPS];
    device const uchar* start = tile_of_codes(rows, strides, first);
#pragma clang loop unroll(full)
    for (int step = 0; step < STEPS; ++step) {
        const int i = step * THREADS + thread_index;
        const int column = existing<N>(i % RUNS * N, columns);
        at[step] = code_row(start, strides, codes, kind, pages, first,
                            min(min(i / RUNS, ROWS - 1), row_count - 1));
        load_run<WORDS>(words[step], at[step].bytes + column * BITS / 8);
        scale[step] = kind.each ? 0.0f : scale_of(at[step], codes, kind, column);
        offset[step] = kind.each ? 0.0f : offset_of(at[step], codes, kind, column);
    }
#pragma clang loop unroll(full)
    for (int step = 0; step < STEPS; ++step) {
        const int i = step * THREADS + thread_index, row = i / RUNS, column = i % RUNS * N;
        if (ROWS * RUNS % THREADS != 0 && row >= ROWS) continue;
        const bool kept = row < row_count && is_channel(column, columns);
        threadgroup M* to = staged + key_slot<ROWS>(row) * ROW + column;
#pragma clang loop unroll(full)
        for (int c = 0; c < N; c += STORED) {
            M x[STORED];
#pragma clang loop unroll(full)
            for (int e = 0; e < STORED; ++e) {
                const int bit = (c + e) * BITS;
                const uint code = words[step][bit / 32] >> bit % 32 & mask_of_code(kind);
                float own = scale[step], zero = offset[step];
                if (kind.each) {
                    const int channel = existing<N>(column, columns) + c + e;
                    own = scale_of(at[step], codes, kind, channel);
                    zero = offset_of(at[step], codes, kind, channel);
                }
                const float number =
                    dequantized(kind.offset, quant_number(kind.codes, code), own, zero);
                x[e] = kept ? M(number) : M(0);
            }
            Store<M, M>::words(to + c, Pack<M>::words(x));
        }
    }
}

/// Copies ROWS rows of D channels of K or V from row `first` on into threadgroup memory, in the order of
/// key_order.h; zeros past the last row and channel. `rows`: row 0 of the sequence. `packed`: key_codes
/// or value_codes. There is a row.
template <typename M, int D, int ROWS, int THREADS>
UMFA_INLINE void stage_codes(threadgroup M* staged, device const uchar* rows,
                             constant OperandStrides& strides, thread const Codes& codes,
                             int packed, thread const Pages& pages, int first, int row_count,
                             int columns, ushort thread_index) {
    const CodeKind kind = unpacked_kind(packed);
    if (kind.wide && bits_of_codes(kind.codes) == 8) {
        stage_runs<8, M, D, ROWS, THREADS>(staged, rows, strides, codes, kind, pages, first,
                                           row_count, columns, thread_index);
    } else if (kind.wide) {
        stage_runs<4, M, D, ROWS, THREADS>(staged, rows, strides, codes, kind, pages, first,
                                           row_count, columns, thread_index);
    } else {
        constexpr int ROW = tile_row<M>(D);
        device const uchar* start = tile_of_codes(rows, strides, first);
        for (int i = thread_index; i < ROWS * D; i += THREADS) {
            const int row = i / D, column = i % D;
            const CodeRow at =
                code_row(start, strides, codes, kind, pages, first, min(row, row_count - 1));
            staged[key_slot<ROWS>(row) * ROW + column] =
                M(number_of(at, codes, kind, row < row_count, column, columns));
        }
    }
}

/// stage_codes() of keys that are rotated on the way, as numbers of type T.
template <typename M, typename T, int D, int ROWS, int THREADS>
UMFA_INLINE void stage_rotated_codes(threadgroup M* staged, device const uchar* rows,
                                     constant OperandStrides& strides, thread const Codes& codes,
                                     int packed, thread const Pages& pages, int first,
                                     int row_count, int columns, thread const Rotary& rotary,
                                     ushort thread_index) {
    const CodeKind kind = unpacked_kind(packed);
    constexpr int ROW = tile_row<M>(D), PAIRS = D / 2;
    device const uchar* start = tile_of_codes(rows, strides, first);
    for (int i = thread_index; i < ROWS * PAIRS; i += THREADS) {
        const int row = i / PAIRS, pair = i % PAIRS;
        const int2 channel = channels_of(rotary, pair);
        const bool there = row < row_count;
        const CodeRow at =
            code_row(start, strides, codes, kind, pages, first, min(row, row_count - 1));
        T a = T(number_of(at, codes, kind, there, channel.x, columns));
        T b = T(number_of(at, codes, kind, there, channel.y, columns));
        if (there && 2 * pair < rotary.params.channels)
            rotate_pair(a, b, rotary, first + row, pair);
        threadgroup M* to = staged + key_slot<ROWS>(row) * ROW;
        to[channel.x] = M(a);
        to[channel.y] = M(b);
    }
}

// The tile that begins at key `k0`, of numbers or of codes. `row_count`: keys from there to the end. `key`
// and `value`: what first_rows() returned, or these functions for the tile before.

template <typename M, typename T, int D, int ROWS, int THREADS>
UMFA_INLINE device const uchar* stage_keys(threadgroup M* staged, device const uchar* key,
                                           thread const Codes& codes,
                                           constant ForwardParams& params,
                                           thread const Pages& pages, int k0, int row_count,
                                           thread const Rotary& rotary, ushort thread_index) {
    if (key_codes != 0) {
        if (rotates_keys)
            stage_rotated_codes<M, T, D, ROWS, THREADS>(staged, key, params.key, codes, key_codes,
                                                        pages, k0, row_count, params.head_dim,
                                                        rotary, thread_index);
        else
            stage_codes<M, D, ROWS, THREADS>(staged, key, params.key, codes, key_codes, pages, k0,
                                             row_count, params.head_dim, thread_index);
        return key;
    }
    if (rotates_keys)
        return stage_any_rotated<M, T, D, ROWS, THREADS>(staged, key, key_kind, params.key, pages,
                                                         k0, row_count, params.head_dim, rotary,
                                                         thread_index);
    return stage_any<M, T, D, ROWS, THREADS>(staged, key, key_kind, params.key, pages, k0,
                                             row_count, params.head_dim, thread_index);
}

template <typename M, typename T, int D, int ROWS, int THREADS>
UMFA_INLINE device const uchar* stage_values(threadgroup M* staged, device const uchar* value,
                                             thread const Codes& codes,
                                             constant ForwardParams& params,
                                             thread const Pages& pages, int k0, int row_count,
                                             ushort thread_index) {
    if (value_codes != 0) {
        stage_codes<M, D, ROWS, THREADS>(staged, value, params.value, codes, value_codes, pages, k0,
                                         row_count, params.head_dim_v, thread_index);
        return value;
    }
    return stage_any<M, T, D, ROWS, THREADS>(staged, value, value_kind, params.value, pages, k0,
                                             row_count, params.head_dim_v, thread_index);
}

}  // namespace umfa
