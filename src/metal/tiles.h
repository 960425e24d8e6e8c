// Tile shapes of the forward kernel, per GPU family and element size: one table, with the reasons.
#pragma once

#include <cstdint>

#include "metal/capabilities.h"

namespace umfa::metal {

/// Kernel head dims. Any smaller head_dim is padded with zeros inside the kernel.
constexpr int forward_head_dims[] = {32, 64, 80, 96, 128, 160, 192, 256};

struct ForwardTile {
    int head_dim;    // largest kernel head_dim the row holds for
    int block_kv;    // keys per tile
    int fragments;   // 8-row fragments per simdgroup
    int simdgroups;  // per threadgroup; a threadgroup owns 8 * fragments * simdgroups queries
};

// Live floats per lane: O fragments * D / 4, S fragments * block_kv / 4, P half of S, Q
// fragments * D / 8 (16-bit operands) or fragments * D / 4, about 20 for addresses. Above about 110
// an Apple GPU spills or keeps too few simdgroups resident (208 KB of them a core).
// Threadgroup bytes: 2 * block_kv * (D + 16 bytes); below 20 KB three groups share a core's 60 KB.

/// 16-bit operands on Apple7 and 8: MLX ships 32 queries with 32 keys below D=128 and 16 from there;
/// 32 keys at D=128 measured 0.71x on M1 (mlx-mfa), for want of registers.
constexpr ForwardTile tiles_16bit_apple7[] = {{96, 32, 1, 4}, {256, 16, 1, 4}};
/// 16-bit operands from Apple9: registers and threadgroup memory share one pool, so 32 keys fit to
/// D=128 (mlx-mfa selects the same on M3).
constexpr ForwardTile tiles_16bit_apple9[] = {{128, 32, 1, 4}, {256, 16, 1, 4}};
/// 32-bit operands: twice the threadgroup bytes and Q registers; 8 keys at D=256 keep to 17 KB.
constexpr ForwardTile tiles_32bit[] = {{64, 32, 1, 4}, {128, 16, 1, 4}, {256, 8, 1, 4}};

}  // namespace umfa::metal
