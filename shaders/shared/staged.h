// What a tile's elements are in threadgroup memory.
#pragma once

#include <metal_stdlib>

using namespace metal;

namespace umfa {

/// Tiles of T whose fragments are M.
template <typename T, typename M>
struct Staged {
    using Type = M;
    /// The channel in row `row` of fragment d, of fragments whose channels a product sums over, and how
    /// far on that of the next row is.
    static constant constexpr int APART = 1;
    static int channel(int d, int row) { return d * 8 + row; }
};
/// bfloat that is multiplied as float stays bfloat, for half the memory and half of what is read, and
/// each lane widens what it reads: four bytes are two neighbouring channels. Where a product sums over
/// the channels, these are in the same row of two fragments. Any order of the channels will do there, if
/// both operands have it.
template <>
struct Staged<bfloat, float> {
    using Type = bfloat;
    static constant constexpr int APART = 2;
    static int channel(int d, int row) { return d / 2 * 16 + row * 2 + d % 2; }
};

}  // namespace umfa
