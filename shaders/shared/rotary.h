// Rotary position embedding (Su et al. 2021) of queries and keys on their way in, rounded to their
// type as if it had been a pass of its own.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/scores.h"

using namespace metal;

namespace umfa {

struct Rotary {
    device const uchar* cos;
    device const uchar* sin;
    RotaryParams params;
};

inline Rotary rotary_of(constant RotaryParams& params, device const uchar* cos,
                        device const uchar* sin) {
    // Initialised, not assigned: a struct in `constant` has no assignment to one of a thread.
    const RotaryParams mine = params;
    const Rotary rotary = {has_rotary ? cos : nullptr, has_rotary ? sin : nullptr, mine};
    return rotary;
}

/// Channels of one pair. Those that are not rotated come in pairs of neighbours.
inline int2 channels_of(thread const Rotary& rotary, int pair) {
    const int half_way = rotary.params.channels / 2;
    return rotary_interleaved || pair >= half_way ? int2(2 * pair, 2 * pair + 1)
                                                  : int2(pair, pair + half_way);
}

/// Where the two runs of N channels begin that hold the pairs `pair` to `pair` + N - 1, N of them.
template <int N>
inline int2 runs_of(thread const Rotary& rotary, int pair) {
    const int half_way = rotary.params.channels / 2;
    return rotary_interleaved || pair >= half_way ? int2(2 * pair, 2 * pair + N)
                                                  : int2(pair, pair + half_way);
}

/// Rotates N pairs that lie in two runs of N channels, one behind the other in `x`; with wide_rotary.
template <int N, typename T>
inline void rotate_runs(thread T* x, thread const Rotary& rotary, int position, int pair) {
    thread const RotaryParams& at = rotary.params;
    device const float4* cos = reinterpret_cast<device const float4*>(
        reinterpret_cast<device const float*>(rotary.cos) + position * at.cos_position + pair);
    device const float4* sin = reinterpret_cast<device const float4*>(
        reinterpret_cast<device const float*>(rotary.sin) + position * at.sin_position + pair);
#pragma clang loop unroll(full)
    for (int i = 0; i < N / 4; ++i) {
        const float4 c = cos[i], s = sin[i];
#pragma clang loop unroll(full)
        for (int e = 0; e < 4; ++e) {
            const int n = 4 * i + e;  // pair n: neighbours, or one of each run
            const int first = rotary_interleaved ? 2 * n : n;
            const int second = rotary_interleaved ? 2 * n + 1 : N + n;
            const float a = float(x[first]), b = float(x[second]);
            x[first] = T(a * c[e] - b * s[e]);
            x[second] = T(a * s[e] + b * c[e]);
        }
    }
}

template <typename T>
inline void rotate_pair(thread T& first, thread T& second, thread const Rotary& rotary,
                        int position, int pair) {
    thread const RotaryParams& at = rotary.params;
    const float cos =
        number_at(rotary.cos, rotary_kind, position * at.cos_position + pair * at.cos_channel);
    const float sin =
        number_at(rotary.sin, rotary_kind, position * at.sin_position + pair * at.sin_channel);
    const float a = float(first), b = float(second);
    first = T(a * cos - b * sin);
    second = T(a * sin + b * cos);
}

/// `element` of a query that stands at `position`.
template <typename M, typename T>
inline M query_element(device const T* rows, constant OperandStrides& strides,
                       thread const Rotary& rotary, int position, int row, int row_count,
                       int column, int columns) {
    if (!has_rotary || row >= row_count || column >= rotary.params.channels)
        return element<M>(rows, strides, row, row_count, column, columns);
    const int half_way = rotary.params.channels / 2;
    const int pair =
        rotary_interleaved ? column / 2 : (column < half_way ? column : column - half_way);
    const int2 at = channels_of(rotary, pair);
    rows += row * strides.row;
    T first = rows[at.x * channel_stride(strides)], second = rows[at.y * channel_stride(strides)];
    rotate_pair(first, second, rotary, position, pair);
    return M(column == at.x ? first : second);
}

/// query_element() for the dtype that `kind` gives.
template <typename M, typename T>
inline M any_query_element(device const uchar* rows, int kind, constant OperandStrides& strides,
                           thread const Rotary& rotary, int position, int row, int row_count,
                           int column, int columns) {
    if (kind == UMFA_MASK_F16)
        return query_element<M>(reinterpret_cast<device const typename Narrow<T>::Half*>(rows),
                                strides, rotary, position, row, row_count, column, columns);
    if (kind == UMFA_MASK_BF16)
        return query_element<M>(reinterpret_cast<device const typename Narrow<T>::Bfloat*>(rows),
                                strides, rotary, position, row, row_count, column, columns);
    return query_element<M>(reinterpret_cast<device const T*>(rows), strides, rotary, position, row,
                            row_count, column, columns);
}

}  // namespace umfa
