// Rotary position embedding in the backward pass: queries and keys are rotated on their way in, as in
// the forward pass, and gradients are rotated back on their way out.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/fragment.h"
#include "shared/gradients.h"
#include "shared/kinds.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/query_gradients.h"
#include "shared/rotary.h"
#include "shared/sequence.h"
#include "shared/staged.h"
#include "shared/tile.h"

using namespace metal;

namespace umfa {

/// The same angles, counted from `position` on.
inline Rotary rotary_from(thread const Rotary& rotary, int position) {
    if (!has_rotary) return rotary;
    const int bytes = rotary_kind == UMFA_MASK_F32 ? 4 : 2;
    Rotary moved_tables = rotary;
    moved_tables.cos += position * rotary.params.cos_position * bytes;
    moved_tables.sin += position * rotary.params.sin_position * bytes;
    return moved_tables;
}

/// load_rows() of queries or keys. `rotary`: counted from row 0.
template <typename T, int ROWS, int DF, typename M>
UMFA_INLINE void load_rotated_rows(thread Fragment<M> (&x)[ROWS][DF], device const uchar* from,
                                   int kind, constant OperandStrides& strides, int first, int rows,
                                   int part, int columns, thread const Rotary& rotary, LaneMap at) {
    if (!has_rotary) {
        load_rows<T>(x, from, kind, strides, first, rows, part, columns, at);
        return;
    }
    constexpr int APART = Staged<T, M>::APART;
#pragma clang loop unroll(full)
    for (int f = 0; f < ROWS; ++f) {
        const int row = first + f * 8 + at.row;
#pragma clang loop unroll(full)
        for (int d = 0; d < DF; ++d) {
            const int column = Staged<T, M>::channel(part * DF + d, at.column);
            set(x[f][d],
                any_query_element<M, T>(from, kind, strides, rotary, row, row, rows, column,
                                        columns),
                any_query_element<M, T>(from, kind, strides, rotary, row, row, rows, column + APART,
                                        columns));
        }
    }
}

/// stage_rows() of queries or keys, likewise.
template <typename E, typename T, int D, int TILE, int THREADS>
inline void stage_rotated_rows(threadgroup E* staged, device const uchar* from, int kind,
                               constant OperandStrides& strides, int first, int rows, int columns,
                               thread const Rotary& rotary, ushort thread_index) {
    if (!has_rotary) {
        stage_rows<E, T, D, TILE, THREADS>(staged, from, kind, strides, first, rows, columns,
                                           thread_index);
        return;
    }
    const Pages none = {nullptr, 0, 0};
    stage_any_rotated<E, T, D, TILE, THREADS>(staged, carried<T>(from, kind, strides, first), kind,
                                              strides, none, first, rows - first, columns, rotary,
                                              thread_index);
}

/// store_gradient_rows() of all simdgroups, whose rows follow each other from `first` on: of queries or
/// keys, likewise. Both channels of a pair have to be there, which different lanes hold: eight rows after
/// the other go through `held`, which all threads may use.
template <typename T, int D, int SIMDGROUPS, int SPLIT, int ROWS, int DF>
UMFA_INLINE void store_rotated_rows(device uchar* to, int kind, constant OperandStrides& strides,
                                    thread Fragment<float> (&d)[ROWS][DF], threadgroup float* held,
                                    int first, int rows, int columns, float factor,
                                    thread const Rotary& rotary, ushort thread_index, LaneMap at) {
    constexpr int THREADS = 32 * SIMDGROUPS, PAIRS = D / 2;
    const int own_block = thread_index / 32 / SPLIT, part = thread_index / 32 % SPLIT;
    if (!has_rotary) {
        store_gradient_rows<T>(to, kind, strides, d, first + own_block * 8 * ROWS, rows, part,
                               columns, factor, at);
        return;
    }
    for (int block = 0; block < SIMDGROUPS / SPLIT; ++block) {
#pragma clang loop unroll(full)
        for (int f = 0; f < ROWS; ++f) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (own_block == block) {
#pragma clang loop unroll(full)
                for (int c = 0; c < DF; ++c) {
                    const int column = (part * DF + c) * 8 + at.column;
                    const float2 x = pair_of(d[f][c]) * factor;
                    held[at.row * D + column] = x.x;
                    held[at.row * D + column + 1] = x.y;
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int i = thread_index; i < 8 * PAIRS; i += THREADS) {
                const int row = first + (block * ROWS + f) * 8 + i / PAIRS, pair = i % PAIRS;
                if (row >= rows) continue;
                const int2 channel = channels_of(rotary, pair);
                threadgroup const float* mine = held + i / PAIRS * D;
                float a = mine[channel.x], b = mine[channel.y];
                // Exchanged, they are rotated the other way.
                if (2 * pair < rotary.params.channels) rotate_pair(b, a, rotary, row, pair);
                device uchar* own = moved_gradient<T>(to, kind, row * strides.row);
                if (channel.x < columns)
                    store_gradient<T>(own, kind, channel.x * channel_stride(strides), a);
                if (channel.y < columns)
                    store_gradient<T>(own, kind, channel.y * channel_stride(strides), b);
            }
        }
    }
}

}  // namespace umfa
