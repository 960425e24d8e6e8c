// Tiles of K and V in threadgroup memory.
#pragma once

#include "shared/fragment.h"
#include "shared/operand.h"
#include "shared/rotary.h"
#include "shared/threadgroup_memory.h"

namespace umfa {

/// tile_row of a tile of M.
template <typename M>
constexpr int tile_row(int columns) {
    return tile_row(columns, sizeof(M));
}

// 16 bytes of T as M, in threadgroup memory.
template <typename M, typename T>
struct Store;
template <typename T>
struct Store<T, T> {
    static void words(threadgroup T* to, uint4 v) { *reinterpret_cast<threadgroup uint4*>(to) = v; }
};
template <>
struct Store<float, half> {
    static uint2 pair(uint bits) {
        const half2 x = as_type<half2>(bits);
        return uint2(as_type<uint>(float(x.x)), as_type<uint>(float(x.y)));
    }
    static void words(threadgroup float* to, uint4 v) {
        const uint2 a = pair(v.x), b = pair(v.y), c = pair(v.z), d = pair(v.w);
        threadgroup uint4* at = reinterpret_cast<threadgroup uint4*>(to);
        at[0] = uint4(a.x, a.y, b.x, b.y);
        at[1] = uint4(c.x, c.y, d.x, d.y);
    }
};
template <>
struct Store<float, bfloat> {
    static void words(threadgroup float* to, uint4 v) {
        const uint4 low = v << 16, high = v & 0xffff0000u;
        threadgroup uint4* at = reinterpret_cast<threadgroup uint4*>(to);
        at[0] = uint4(low.x, high.x, low.y, high.y);
        at[1] = uint4(low.z, high.z, low.w, high.w);
    }
};

/// Copies ROWS rows of D channels of K or V into threadgroup memory, from key `first` on; zeros past
/// the last row and channel.
template <typename M, int D, int ROWS, int THREADS, typename T>
inline void stage(threadgroup M* staged, device const T* keys, constant OperandStrides& strides,
                  Pages pages, int first, int row_count, int columns, ushort thread_index) {
    device const T* rows = has_pages ? keys : keys + first * strides.row;
    pages.first += first;
    constexpr int ROW = tile_row<M>(D);
    if (wide_loads) {
        constexpr int N = 16 / sizeof(T), STEPS = (ROWS * D / N + THREADS - 1) / THREADS;
        uint4 words[STEPS];
        // All loads are under way before the first is stored.
#pragma clang loop unroll(full)
        for (int step = 0; step < STEPS; ++step) {
            const int i = step * THREADS + thread_index, row = i / (D / N),
                      column = i % (D / N) * N;
            words[step] = uint4(0u);
            if (row < ROWS && row < row_count && column < columns)
                words[step] = *reinterpret_cast<device const uint4*>(
                    key_row(rows, strides, pages, row) + column);
        }
#pragma clang loop unroll(full)
        for (int step = 0; step < STEPS; ++step) {
            const int i = step * THREADS + thread_index, row = i / (D / N),
                      column = i % (D / N) * N;
            if (row < ROWS) Store<M, T>::words(staged + row * ROW + column, words[step]);
        }
    } else {
        for (int i = thread_index; i < ROWS * D; i += THREADS) {
            const int row = i / D, column = i % D;
            staged[row * ROW + column] =
                element<M>(rows, strides, pages, row, row_count, column, columns);
        }
    }
}

/// stage() for the dtype that `kind` gives.
template <typename M, typename T, int D, int ROWS, int THREADS>
inline void stage_any(threadgroup M* staged, device const uchar* keys, int kind,
                      constant OperandStrides& strides, thread const Pages& pages, int first,
                      int row_count, int columns, ushort thread_index) {
    if (kind == UMFA_MASK_F16)
        stage<M, D, ROWS, THREADS>(staged,
                                   reinterpret_cast<device const typename Narrow<T>::Half*>(keys),
                                   strides, pages, first, row_count, columns, thread_index);
    else if (kind == UMFA_MASK_BF16)
        stage<M, D, ROWS, THREADS>(staged,
                                   reinterpret_cast<device const typename Narrow<T>::Bfloat*>(keys),
                                   strides, pages, first, row_count, columns, thread_index);
    else
        stage<M, D, ROWS, THREADS>(staged, reinterpret_cast<device const T*>(keys), strides, pages,
                                   first, row_count, columns, thread_index);
}

// 16 bytes of elements as words.
template <typename T>
struct Pack;
template <>
struct Pack<half> {
    static uint4 words(thread const half* x) {
        return uint4(as_type<uint>(half2(x[0], x[1])), as_type<uint>(half2(x[2], x[3])),
                     as_type<uint>(half2(x[4], x[5])), as_type<uint>(half2(x[6], x[7])));
    }
};
template <>
struct Pack<bfloat> {
    static uint word(bfloat first, bfloat second) {
        return uint(as_type<ushort>(first)) | uint(as_type<ushort>(second)) << 16;
    }
    static uint4 words(thread const bfloat* x) {
        return uint4(word(x[0], x[1]), word(x[2], x[3]), word(x[4], x[5]), word(x[6], x[7]));
    }
};
template <>
struct Pack<float> {
    static uint4 words(thread const float* x) {
        return uint4(as_type<uint>(x[0]), as_type<uint>(x[1]), as_type<uint>(x[2]),
                     as_type<uint>(x[3]));
    }
};

/// The same of keys that are rotated on the way, each by the angles of its position. By single
/// elements this took more than the products (H100, D = 64: 2.2 times the time of a call without).
template <typename M, int D, int ROWS, int THREADS, typename T>
inline void stage_rotated(threadgroup M* staged, device const T* keys,
                          constant OperandStrides& strides, Pages pages, int first, int row_count,
                          int columns, thread const Rotary& rotary, ushort thread_index) {
    device const T* rows = has_pages ? keys : keys + first * strides.row;
    pages.first += first;
    if (wide_rotary) {
        constexpr int ROW = tile_row<M>(D), N = 16 / sizeof(T), RUNS = D / (2 * N);
        for (int i = thread_index; i < ROWS * RUNS; i += THREADS) {
            const int row = i / RUNS, pair = i % RUNS * N;
            const int2 at = runs_of<N>(rotary, pair);
            const bool there = row < row_count;
            device const T* key = has_pages && !there ? rows : key_row(rows, strides, pages, row);
            T x[2 * N];
            load_elements<N>(x, key, strides, there, at.x, columns);
            load_elements<N>(x + N, key, strides, there, at.y, columns);
            if (there && 2 * pair < rotary.params.channels)
                rotate_runs<N>(x, rotary, first + row, pair);
            Store<M, T>::words(staged + row * ROW + at.x, Pack<T>::words(x));
            Store<M, T>::words(staged + row * ROW + at.y, Pack<T>::words(x + N));
        }
        return;
    }
    constexpr int ROW = tile_row<M>(D), PAIRS = D / 2;
    for (int i = thread_index; i < ROWS * PAIRS; i += THREADS) {
        const int row = i / PAIRS, pair = i % PAIRS;
        const int2 at = channels_of(rotary, pair);
        T a = element<T>(rows, strides, pages, row, row_count, at.x, columns);
        T b = element<T>(rows, strides, pages, row, row_count, at.y, columns);
        if (row < row_count && 2 * pair < rotary.params.channels)
            rotate_pair(a, b, rotary, first + row, pair);
        staged[row * ROW + at.x] = M(a);
        staged[row * ROW + at.y] = M(b);
    }
}

/// stage_rotated() for the dtype that `kind` gives.
template <typename M, typename T, int D, int ROWS, int THREADS>
inline void stage_any_rotated(threadgroup M* staged, device const uchar* keys, int kind,
                              constant OperandStrides& strides, thread const Pages& pages,
                              int first, int row_count, int columns, thread const Rotary& rotary,
                              ushort thread_index) {
    if (kind == UMFA_MASK_F16)
        stage_rotated<M, D, ROWS, THREADS>(
            staged, reinterpret_cast<device const typename Narrow<T>::Half*>(keys), strides, pages,
            first, row_count, columns, rotary, thread_index);
    else if (kind == UMFA_MASK_BF16)
        stage_rotated<M, D, ROWS, THREADS>(
            staged, reinterpret_cast<device const typename Narrow<T>::Bfloat*>(keys), strides,
            pages, first, row_count, columns, rotary, thread_index);
    else
        stage_rotated<M, D, ROWS, THREADS>(staged, reinterpret_cast<device const T*>(keys), strides,
                                           pages, first, row_count, columns, rotary, thread_index);
}

}  // namespace umfa
