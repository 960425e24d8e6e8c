// Tiles of K and V in threadgroup memory.
#pragma once

#include "shared/fragment.h"
#include "shared/key_order.h"
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

/// How the threads of a threadgroup load a tile of ROWS rows of D channels of T, 16 bytes at a time.
template <int D, int ROWS, int THREADS, typename T>
struct Loads {
    static constant constexpr int N = 16 / sizeof(T), CHUNKS = D / N,
                                  STEPS = 1 + (ROWS * CHUNKS - 1) / THREADS;
    /// In each step whole rows, one behind the other: a thread stays in its channels.
    static constant constexpr bool IN_ROWS = THREADS % CHUNKS == 0 && ROWS * CHUNKS % THREADS == 0;

    static int row(int step, ushort thread_index) {
        return IN_ROWS ? thread_index / CHUNKS + step * (THREADS / CHUNKS)
                       : (step * THREADS + thread_index) / CHUNKS;
    }
    static int column(int step, ushort thread_index) {
        return (IN_ROWS ? thread_index : step * THREADS + thread_index) % CHUNKS * N;
    }
    /// Whether a thread walks from row to row and on to the next tile by additions. Products for each
    /// row would be kept in registers from tile to tile: float32 with D = 128 then spills 36 bytes
    /// instead of 8 (ptxas, sm_90, three threadgroups a multiprocessor).
    static bool walk() { return IN_ROWS && wide_loads && carries_rows(); }
    /// From the first row of a tile to where the thread's walk begins.
    static int64_t start(constant OperandStrides& strides, int columns, ushort thread_index) {
        return rows_apart(row(0, thread_index), strides) +
               existing<N>(column(0, thread_index), columns);
    }
};

/// Loads a tile from where the thread's walk begins; returns where it does in the next one. WHOLE: the
/// tile has ROWS rows; else it is the last, with zeros past `row_count`.
template <bool WHOLE, int D, int ROWS, int THREADS, int STEPS, typename T>
inline device const T* walk_tile(thread uint4 (&words)[STEPS], device const T* at,
                                 constant OperandStrides& strides, int row_count, int columns,
                                 ushort thread_index) {
    typedef Loads<D, ROWS, THREADS, T> Mine;
#pragma clang loop unroll(full)
    for (int step = 0; step < STEPS; ++step) {
        const int more = row_count - 1 - Mine::row(0, thread_index);  // rows behind the first
        words[step] = *reinterpret_cast<device const uint4*>(
            WHOLE ? at : at + rows_apart(min(step * (THREADS / Mine::CHUNKS), more), strides));
        if (WHOLE) at += rows_apart(THREADS / Mine::CHUNKS, strides);
    }
    if (WHOLE && whole_channels) return at;
#pragma clang loop unroll(full)
    for (int step = 0; step < STEPS; ++step)
        words[step] &= kept_bits(
            (WHOLE || step * (THREADS / Mine::CHUNKS) < row_count - Mine::row(0, thread_index)) &&
            is_channel(Mine::column(0, thread_index), columns));
    return at;
}

/// Loads a tile from its first row on. WHOLE: it has ROWS rows; else zeros past `row_count`.
template <bool WHOLE, int D, int ROWS, int THREADS, int STEPS, typename T>
inline void load_tile(thread uint4 (&words)[STEPS], device const T* rows,
                      constant OperandStrides& strides, thread const Pages& pages, int row_count,
                      int columns, ushort thread_index) {
    typedef Loads<D, ROWS, THREADS, T> Mine;
#pragma clang loop unroll(full)
    for (int step = 0; step < STEPS; ++step) {
        int row = Mine::row(step, thread_index);
        if (!WHOLE)
            row = min(row, row_count - 1);
        else if (!Mine::IN_ROWS)
            row = min(row, ROWS - 1);
        words[step] = *reinterpret_cast<device const uint4*>(
            key_row(rows, strides, pages, row) +
            existing<Mine::N>(Mine::column(step, thread_index), columns));
    }
    if (WHOLE && whole_channels) return;
#pragma clang loop unroll(full)
    for (int step = 0; step < STEPS; ++step)
        words[step] &= kept_bits((WHOLE || Mine::row(step, thread_index) < row_count) &&
                                 is_channel(Mine::column(step, thread_index), columns));
}

/// Copies ROWS rows of D channels of K or V into threadgroup memory, in the order of key_order.h; zeros
/// past the last row and channel. `rows`: what first_rows() returned, or this for the tile before. Returns the same for the
/// next tile, but `rows` where this one is not whole, since none follows. There is a row.
template <typename M, int D, int ROWS, int THREADS, typename T>
inline device const T* stage(threadgroup M* staged, device const T* rows,
                             constant OperandStrides& strides, Pages pages, int first,
                             int row_count, int columns, ushort thread_index) {
    typedef Loads<D, ROWS, THREADS, T> Mine;
    constexpr int ROW = tile_row<M>(D);
    pages.first += first;
    device const T* start = tile_rows(rows, strides, first);
    const bool whole = row_count >= ROWS;
    device const T* next = whole ? carried(rows, strides, ROWS) : rows;
    if (wide_loads) {
        uint4 words[Mine::STEPS];  // all loads are under way before the first is stored
        if (Mine::walk() && whole)
            next = walk_tile<true, D, ROWS, THREADS>(words, start, strides, row_count, columns,
                                                     thread_index);
        else if (Mine::walk())
            next = walk_tile<false, D, ROWS, THREADS>(words, start, strides, row_count, columns,
                                                      thread_index);
        else if (whole)
            load_tile<true, D, ROWS, THREADS>(words, start, strides, pages, row_count, columns,
                                              thread_index);
        else
            load_tile<false, D, ROWS, THREADS>(words, start, strides, pages, row_count, columns,
                                               thread_index);
#pragma clang loop unroll(full)
        for (int step = 0; step < Mine::STEPS; ++step) {
            const int row = Mine::row(step, thread_index);
            if (Mine::IN_ROWS || row < ROWS)
                Store<M, T>::words(
                    staged + key_slot<ROWS>(row) * ROW + Mine::column(step, thread_index),
                    words[step]);
        }
    } else {
        for (int i = thread_index; i < ROWS * D; i += THREADS) {
            const int row = i / D, column = i % D;
            staged[key_slot<ROWS>(row) * ROW + column] =
                element<M>(start, strides, pages, row, row_count, column, columns);
        }
    }
    return next;
}

/// What stage() takes for the first tile, at `first`; `rows`: of the sequence.
template <typename T, int D, int ROWS, int THREADS>
inline device const uchar* first_rows(device const uchar* rows, int kind,
                                      constant OperandStrides& strides, int first, int columns,
                                      ushort thread_index) {
    rows = carried<T>(rows, kind, strides, first);
    if (kind == UMFA_KIND_CODES) return rows;
    if (kind != UMFA_MASK_NONE && Loads<D, ROWS, THREADS, ushort>::walk())
        return moved<T>(rows, kind,
                        Loads<D, ROWS, THREADS, ushort>::start(strides, columns, thread_index));
    if (kind == UMFA_MASK_NONE && Loads<D, ROWS, THREADS, T>::walk())
        return moved<T>(rows, kind,
                        Loads<D, ROWS, THREADS, T>::start(strides, columns, thread_index));
    return rows;
}

/// stage() for the dtype that `kind` gives.
template <typename M, typename T, int D, int ROWS, int THREADS>
inline device const uchar* stage_any(threadgroup M* staged, device const uchar* rows, int kind,
                                     constant OperandStrides& strides, thread const Pages& pages,
                                     int first, int row_count, int columns, ushort thread_index) {
    if (kind == UMFA_MASK_F16)
        return reinterpret_cast<device const uchar*>(stage<M, D, ROWS, THREADS>(
            staged, reinterpret_cast<device const typename Narrow<T>::Half*>(rows), strides, pages,
            first, row_count, columns, thread_index));
    if (kind == UMFA_MASK_BF16)
        return reinterpret_cast<device const uchar*>(stage<M, D, ROWS, THREADS>(
            staged, reinterpret_cast<device const typename Narrow<T>::Bfloat*>(rows), strides,
            pages, first, row_count, columns, thread_index));
    return reinterpret_cast<device const uchar*>(
        stage<M, D, ROWS, THREADS>(staged, reinterpret_cast<device const T*>(rows), strides, pages,
                                   first, row_count, columns, thread_index));
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
inline device const T* stage_rotated(threadgroup M* staged, device const T* rows,
                                     constant OperandStrides& strides, Pages pages, int first,
                                     int row_count, int columns, thread const Rotary& rotary,
                                     ushort thread_index) {
    pages.first += first;
    device const T* start = tile_rows(rows, strides, first);
    device const T* next = row_count >= ROWS ? carried(rows, strides, ROWS) : rows;
    if (wide_rotary) {
        constexpr int ROW = tile_row<M>(D), N = 16 / sizeof(T), RUNS = D / (2 * N);
        for (int i = thread_index; i < ROWS * RUNS; i += THREADS) {
            const int row = i / RUNS, pair = i % RUNS * N;
            const int2 at = runs_of<N>(rotary, pair);
            const bool there = row < row_count;
            device const T* key = key_row(start, strides, pages, min(row, row_count - 1));
            T x[2 * N];
            load_elements<N>(x, key, strides, there, at.x, columns);
            load_elements<N>(x + N, key, strides, there, at.y, columns);
            if (there && 2 * pair < rotary.params.channels)
                rotate_runs<N>(x, rotary, first + row, pair);
            threadgroup M* to = staged + key_slot<ROWS>(row) * ROW;
            Store<M, T>::words(to + at.x, Pack<T>::words(x));
            Store<M, T>::words(to + at.y, Pack<T>::words(x + N));
        }
        return next;
    }
    constexpr int ROW = tile_row<M>(D), PAIRS = D / 2;
    for (int i = thread_index; i < ROWS * PAIRS; i += THREADS) {
        const int row = i / PAIRS, pair = i % PAIRS;
        const int2 at = channels_of(rotary, pair);
        T a = element<T>(start, strides, pages, row, row_count, at.x, columns);
        T b = element<T>(start, strides, pages, row, row_count, at.y, columns);
        if (row < row_count && 2 * pair < rotary.params.channels)
            rotate_pair(a, b, rotary, first + row, pair);
        threadgroup M* to = staged + key_slot<ROWS>(row) * ROW;
        to[at.x] = M(a);
        to[at.y] = M(b);
    }
    return next;
}

/// stage_rotated() for the dtype that `kind` gives.
template <typename M, typename T, int D, int ROWS, int THREADS>
inline device const uchar* stage_any_rotated(threadgroup M* staged, device const uchar* rows,
                                             int kind, constant OperandStrides& strides,
                                             thread const Pages& pages, int first, int row_count,
                                             int columns, thread const Rotary& rotary,
                                             ushort thread_index) {
    if (kind == UMFA_MASK_F16)
        return reinterpret_cast<device const uchar*>(stage_rotated<M, D, ROWS, THREADS>(
            staged, reinterpret_cast<device const typename Narrow<T>::Half*>(rows), strides, pages,
            first, row_count, columns, rotary, thread_index));
    if (kind == UMFA_MASK_BF16)
        return reinterpret_cast<device const uchar*>(stage_rotated<M, D, ROWS, THREADS>(
            staged, reinterpret_cast<device const typename Narrow<T>::Bfloat*>(rows), strides,
            pages, first, row_count, columns, rotary, thread_index));
    return reinterpret_cast<device const uchar*>(
        stage_rotated<M, D, ROWS, THREADS>(staged, reinterpret_cast<device const T*>(rows), strides,
                                           pages, first, row_count, columns, rotary, thread_index));
}

}  // namespace umfa
