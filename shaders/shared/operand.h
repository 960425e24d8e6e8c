// Reading the operands of attention: single elements, and 16 bytes at a time where the planner has
// seen that every row is aligned for it.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/kinds.h"
#include "shared/params.h"
#include "shared/sequence.h"

using namespace metal;

namespace umfa {

inline int64_t channel_stride(constant OperandStrides& strides) {
    return unit_channels ? 1 : strides.channel;
}

// Past the last row or channel, loads read the last one again and take zero in its place: padding is
// never read, and 0 * NaN never reaches P V. A load under a condition becomes a branch, because no
// compiler reads memory that the program might not read. LLVM makes one again if the condition that
// chooses zero also chooses the address, or if it chooses several words: hence minima and bits.

/// Whether the tensors have this channel.
inline bool is_channel(int column, int columns) { return whole_channels || column < columns; }

/// The channel where N of them can be read instead of those at `column`.
template <int N>
inline int existing(int column, int columns) {
    return whole_channels ? column : min(column, columns - N);
}

/// All bits where words are kept, none where zeros replace them.
inline uint kept_bits(bool keeps) { return keeps ? 0xffffffffu : 0u; }

/// One element, zero past the last row and column.
template <typename M, typename T>
inline M element(device const T* rows, constant OperandStrides& strides, int row, int row_count,
                 int column, int columns) {
    const T found = rows[min(row, row_count - 1) * strides.row +
                         existing<1>(column, columns) * channel_stride(strides)];
    return row < row_count && is_channel(column, columns) ? M(found) : M(0);
}

/// The same of K and V, whose rows may lie in pages.
template <typename M, typename T>
inline M element(device const T* rows, constant OperandStrides& strides, thread const Pages& pages,
                 int row, int row_count, int column, int columns) {
    device const T* at = key_row(rows, strides, pages, min(row, row_count - 1));
    const T found = at[existing<1>(column, columns) * channel_stride(strides)];
    return row < row_count && is_channel(column, columns) ? M(found) : M(0);
}

/// element() for the dtype that `kind` gives.
template <typename M, typename T>
inline M any_element(device const uchar* rows, int kind, constant OperandStrides& strides, int row,
                     int row_count, int column, int columns) {
    if (kind == UMFA_MASK_F16)
        return element<M>(reinterpret_cast<device const typename Narrow<T>::Half*>(rows), strides,
                          row, row_count, column, columns);
    if (kind == UMFA_MASK_BF16)
        return element<M>(reinterpret_cast<device const typename Narrow<T>::Bfloat*>(rows), strides,
                          row, row_count, column, columns);
    return element<M>(reinterpret_cast<device const T*>(rows), strides, row, row_count, column,
                      columns);
}

// The first or second 16-bit element of four bytes, or the 32-bit one, in the type of the fragments.
template <typename M, typename T>
struct Unpack;
template <>
struct Unpack<half, half> {
    static half get(uint bits, bool second) {
        const half2 pair = as_type<half2>(bits);
        return second ? pair.y : pair.x;
    }
};
template <>
struct Unpack<bfloat, bfloat> {
    static bfloat get(uint bits, bool second) {
        return as_type<bfloat>(ushort(second ? bits >> 16 : bits));
    }
};
template <>
struct Unpack<float, half> {
    static float get(uint bits, bool second) {
        const half2 pair = as_type<half2>(bits);
        return float(second ? pair.y : pair.x);
    }
};
template <>
struct Unpack<float, bfloat> {
    static float get(uint bits, bool second) {
        return as_type<float>(second ? bits & 0xffff0000u : bits << 16);
    }
};
template <>
struct Unpack<float, float> {
    static float get(uint bits, bool) { return as_type<float>(bits); }
};

/// Reads 1, 2 or 4 words of 4 bytes at once.
template <int WORDS>
struct Words;
template <>
struct Words<1> {
    static void load(thread uint* words, device const void* at) {
        words[0] = *reinterpret_cast<device const uint*>(at);
    }
};
template <>
struct Words<2> {
    static void load(thread uint* words, device const void* at) {
        const uint2 v = *reinterpret_cast<device const uint2*>(at);
        words[0] = v.x;
        words[1] = v.y;
    }
};
template <>
struct Words<4> {
    static void load(thread uint* words, device const void* at) {
        const uint4 v = *reinterpret_cast<device const uint4*>(at);
        words[0] = v.x;
        words[1] = v.y;
        words[2] = v.z;
        words[3] = v.w;
    }
};

/// N neighbours of the existing row that starts at `row`, which take 4, 8 or 16 bytes; zeros past the
/// last channel, and where not `there`.
template <int N, typename M, typename T>
inline void load_elements(thread M* elements, device const T* row, constant OperandStrides& strides,
                          bool there, int column, int columns) {
    if (wide_loads) {
        constexpr int PER_WORD = 4 / sizeof(T), WORDS = N / PER_WORD;
        uint words[WORDS];
        Words<WORDS>::load(words, row + existing<N>(column, columns));
        const uint kept = kept_bits(there && is_channel(column, columns));
#pragma clang loop unroll(full)
        for (int i = 0; i < WORDS; ++i) words[i] &= kept;
#pragma clang loop unroll(full)
        for (int i = 0; i < N; ++i)
            elements[i] = Unpack<M, T>::get(words[i / PER_WORD], i % PER_WORD != 0);
    } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < N; ++i) {
            const M found = element<M>(row, strides, 0, 1, column + i, columns);
            elements[i] = there ? found : M(0);
        }
    }
}

}  // namespace umfa
