// 8x8 fragments held by one simdgroup, two adjacent columns of one row per lane.
#pragma once

#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

namespace umfa {

template <typename T>
using Fragment = simdgroup_matrix<T, 8, 8>;

/// Where a lane's two elements lie in an 8x8 fragment: (row, column) and (row, column + 1).
///
/// Apple documents no such map; every production kernel relies on this one, for all three operands
/// alike. The lanes of one row differ in bits 0 and 3, those of one column in bits 1, 2 and 4.
struct LaneMap {
    short row, column;
};

inline LaneMap lane_map(ushort lane) {
    LaneMap at;
#ifdef UMFA_METAL_EMULATOR
    // The emulator may lay fragments out otherwise, to catch code that knows the map by itself.
    (void)lane;
    at.row = umfa_lane_row();
    at.column = umfa_lane_column();
#else
    const short four = lane / 4;
    at.row = (four & 4) + (lane / 2) % 4;
    at.column = (four & 2) * 2 + (lane % 2) * 2;
#endif
    return at;
}

/// Largest element of a row, over the four lanes that hold it; `x` is this lane's own largest.
inline float row_max(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(1)));
    return max(x, simd_shuffle_xor(x, ushort(8)));
}

/// Sum of a row, over the four lanes that hold it; `x` is this lane's own sum.
inline float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(8));
}

// Elements are read and written by constant indices: a computed index into thread_elements() that
// stays one after unrolling would go through memory.
template <typename T>
inline void set(thread Fragment<T>& frag, T first, T second) {
    frag.thread_elements()[0] = first;
    frag.thread_elements()[1] = second;
}

/// This lane's two elements.
inline float2 pair_of(thread Fragment<float>& frag) {
    return float2(frag.thread_elements()[0], frag.thread_elements()[1]);
}

inline void set_pair(thread Fragment<float>& frag, float2 pair) { set(frag, pair.x, pair.y); }

}  // namespace umfa
