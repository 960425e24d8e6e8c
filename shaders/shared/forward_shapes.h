// Tile shapes of the forward kernel: the one list from which forward.metal instantiates kernels and
// the planner (src/metal/plan_forward.cpp) picks them.
//
// UMFA_FORWARD_SHAPES_16(X), _32(X) and _WIDENED(X) are lists of
//     X(D, DV, BK, QF, SIMDGROUPS, SPLIT, ONE_TILE, FENCES, FIRST, LAST)
// for elements of 16 bits, of 32 bits, and of 16 bits in fragments of 32, in which the planner takes
// the first row that holds the head dims and the GPU's family:
//
//   D, DV       channels of Q and K, and of V: smaller tensors are padded with zeros in the kernel
//   BK          keys per tile
//   QF          8-row fragments of queries per simdgroup
//   SIMDGROUPS  per threadgroup
//   SPLIT       simdgroups that share the channels of one block of rows
//   ONE_TILE    V takes the place of K in threadgroup memory, for two more barriers a tile
//   FENCES      where Apple's compiler may not move loads of fragments ahead, which would take more
//               registers than there are: 1, past a step of Q K; 2, also past 8 keys of P V (MLX's
//               kernels have such fences, the second sort from D = 128 on)
//   FIRST, LAST Apple GPU families: 7 = M1, 8 = M2, 9 = M3 and M4, 10 = M5
//
// What decides:
// * Registers. Live floats per lane: O takes QF * DV / SPLIT / 4, S and P QF * BK * 3 / 8, Q
//   QF * D / SPLIT / 8 (16-bit fragments) or / 4, a second part of the queries as much for DV,
//   addresses about 20. Above about 110 an Apple GPU spills or keeps too few simdgroups resident
//   (208 KB of them a core).
// * Threadgroup memory. (D + DV) * BK elements and 16 bytes a row, 32 KB at most; below 20 KB three
//   threadgroups share a core's 60 KB.
// * Traffic. Each fragment of K and V read from threadgroup memory serves QF products.
//
// UMFA_FORWARD_ALTERNATIVES_16(X), _32(X) and _WIDENED(X) are lists of other shapes for the same head dims, which
// `python -m umfa tune` times on the user's GPU. The planner takes one only where a record says so.
#pragma once

// 16 bits: half; bfloat from Apple9 on.
// Up to D = 64 two fragments of queries fit the registers (D = 64: 32 + 24 + 16 + 20) and halve the
// threadgroup traffic. Eight simdgroups also halve the device traffic at D = 64, and the registers that
// staging takes: 1.57 ms instead of 1.72 (H200, 4 x 16 x 4096; D = 32: 1.22 instead of 1.17). Where that
// leaves cores idle, the planner takes the alternative with four. From D = 80 on one fragment fits: two
// would take 118 at D = 80. At D = 128 Apple7 and 8 take 16 keys: 32 measured 0.71x there (mlx-mfa, M1),
// for want of registers; on Apple9 registers and threadgroup memory are one pool, and 32 keys fit
// (mlx-mfa selects the same on M3). At D = 256 one simdgroup would take 122: on Apple7 and 8 two
// share the channels, and take 80 with twice the keys.
// Apple10 as Apple9: its matrix units are reached through Metal 4's matmul2d alone, and simdgroup
// matrices run as before. 192/128 is the shape of DeepSeek's MLA, 576/512 that of its latent vectors,
// and 64/512 the same with the latent part of the queries apart.
#define UMFA_FORWARD_SHAPES_16(X)             \
    X(32, 32, 32, 2, 4, 1, false, 1, 7, 10)   \
    X(64, 64, 32, 2, 8, 1, false, 1, 7, 10)   \
    X(80, 80, 32, 1, 4, 1, false, 1, 7, 10)   \
    X(96, 96, 32, 1, 4, 1, false, 1, 7, 10)   \
    X(128, 128, 16, 1, 4, 1, false, 2, 7, 8)  \
    X(128, 128, 32, 1, 4, 1, false, 2, 9, 10) \
    X(160, 160, 16, 1, 4, 1, false, 2, 7, 10) \
    X(192, 128, 16, 1, 4, 1, false, 2, 7, 10) \
    X(192, 192, 16, 1, 4, 1, false, 2, 7, 10) \
    X(256, 256, 32, 1, 8, 2, true, 2, 7, 8)   \
    X(256, 256, 16, 1, 4, 1, false, 2, 9, 10) \
    X(64, 512, 16, 1, 8, 4, false, 2, 7, 10)  \
    X(512, 512, 16, 1, 4, 2, true, 2, 7, 10)  \
    X(576, 512, 16, 1, 8, 4, true, 2, 7, 10)

// 32 bits: float. Twice the bytes: from D = 160 simdgroups share the channels, or Q would not fit the
// registers.
#define UMFA_FORWARD_SHAPES_32(X)             \
    X(32, 32, 32, 1, 4, 1, false, 1, 7, 10)   \
    X(64, 64, 32, 1, 4, 1, false, 1, 7, 10)   \
    X(80, 80, 16, 1, 4, 1, false, 1, 7, 10)   \
    X(96, 96, 16, 1, 4, 1, false, 1, 7, 10)   \
    X(128, 128, 16, 1, 4, 1, false, 2, 7, 10) \
    X(160, 160, 8, 1, 4, 2, false, 2, 7, 10)  \
    X(192, 128, 8, 1, 4, 2, false, 2, 7, 10)  \
    X(192, 192, 8, 1, 4, 2, false, 2, 7, 10)  \
    X(256, 256, 8, 1, 4, 2, false, 2, 7, 10)  \
    X(64, 512, 8, 1, 8, 4, false, 2, 7, 10)   \
    X(512, 512, 8, 1, 8, 4, true, 2, 7, 10)   \
    X(576, 512, 8, 1, 8, 4, true, 2, 7, 10)

// 16 bits in fragments of 32: bfloat before Apple9, where bfloat arithmetic is emulated.
// Registers as for 32 bits, threadgroup memory as for 16 (staged.h). Two fragments of queries also halve
// the work of widening, which each product of a tile's fragment shares. At D = 64 they take 96 with 16
// keys, and 108 with 32.
#define UMFA_FORWARD_SHAPES_WIDENED(X)       \
    X(32, 32, 32, 2, 4, 1, false, 1, 7, 8)   \
    X(64, 64, 16, 2, 4, 1, false, 1, 7, 8)   \
    X(80, 80, 32, 1, 4, 1, false, 1, 7, 8)   \
    X(96, 96, 32, 1, 4, 1, false, 1, 7, 8)   \
    X(128, 128, 16, 1, 4, 1, false, 2, 7, 8) \
    X(160, 160, 16, 1, 8, 2, false, 2, 7, 8) \
    X(192, 128, 16, 1, 8, 2, false, 2, 7, 8) \
    X(192, 192, 16, 1, 8, 2, false, 2, 7, 8) \
    X(256, 256, 32, 1, 8, 2, true, 2, 7, 8)  \
    X(64, 512, 16, 1, 8, 4, false, 2, 7, 8)  \
    X(512, 512, 16, 1, 8, 4, true, 2, 7, 8)  \
    X(576, 512, 16, 1, 8, 4, true, 2, 7, 8)

// The fences and the keys of a tile are estimates of what Apple's compiler does, and one fragment of
// queries at D = 64 needs fewer registers.
#define UMFA_FORWARD_ALTERNATIVES_16(X)       \
    X(64, 64, 32, 2, 4, 1, false, 1, 7, 10)   \
    X(64, 64, 32, 2, 4, 1, false, 0, 7, 10)   \
    X(64, 64, 32, 1, 4, 1, false, 1, 7, 10)   \
    X(128, 128, 32, 1, 4, 1, false, 2, 7, 8)  \
    X(128, 128, 16, 1, 4, 1, false, 0, 7, 8)  \
    X(128, 128, 16, 1, 4, 1, false, 2, 9, 10) \
    X(128, 128, 32, 1, 4, 1, false, 0, 9, 10)

#define UMFA_FORWARD_ALTERNATIVES_32(X)     \
    X(64, 64, 32, 1, 4, 1, false, 0, 7, 10) \
    X(128, 128, 16, 1, 4, 1, false, 0, 7, 10)

#define UMFA_FORWARD_ALTERNATIVES_WIDENED(X) \
    X(64, 64, 32, 2, 4, 1, false, 1, 7, 8)   \
    X(64, 64, 16, 2, 4, 1, false, 0, 7, 8)   \
    X(128, 128, 32, 1, 4, 1, false, 2, 7, 8) \
    X(128, 128, 16, 1, 4, 1, false, 0, 7, 8)
