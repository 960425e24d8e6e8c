// Tile shapes of the kernels of the backward pass: the one list from which backward.metal and
// backward_mask.metal, whose kernels have the shapes of those of dQ, instantiate kernels and the
// planner (src/metal/plan_backward.cpp) picks them.
//
// UMFA_DQ_SHAPES_16(X), _32(X) and _WIDENED(X), and the same of UMFA_DKV, are lists of
//     X(D, DV, TILE, ROWS, SIMDGROUPS, SPLIT, ONE_TILE, FIRST, LAST)
// for elements of 16 bits, of 32 bits, and of 16 bits in fragments of 32 (bfloat before Apple9), in
// which the planner takes the first row that holds the head dims and the GPU's family:
//
//   D, DV       channels of Q and K, and of V: smaller tensors are padded with zeros in the kernel
//   TILE        keys (dQ) or queries (dK, dV) per tile
//   ROWS        8-row fragments of queries or keys per simdgroup
//   SIMDGROUPS  per threadgroup
//   SPLIT       simdgroups that share the channels of one block of rows
//   ONE_TILE    K takes the place of V in threadgroup memory, and Q that of dO, which umfa_dkv then
//               stages twice
//   FIRST, LAST Apple GPU families, as in forward_shapes.h
//
// What decides:
// * Registers, as in forward_shapes.h, at most about 110. dQ: Q, dO and dQ take ROWS * (D / 8 + DV / 8
//   + D / 4) / SPLIT live floats (16-bit fragments; 32 bits: D / 4 and DV / 4), S and dP
//   ROWS * TILE / 2. dK and dV: K, V, dK and dV take ROWS * (D / 8 + DV / 8 + D / 4 + DV / 4) / SPLIT,
//   S, dP and P ROWS * TILE * 5 / 8. About 20 are addresses. With qv, dQ takes
//   ROWS * (DV / 8 + DV / 4) / SPLIT more, which the larger shapes have no room for: they spill.
// * Threadgroup memory, 32 KB at most: (D + DV) * TILE elements and 16 bytes a row, of one tile D * TILE;
//   for rotated gradients at least 32 * D bytes; with SPLIT > 1 also the partial S and dP,
//   SIMDGROUPS * ROWS * TILE * 64 bytes.
// * Traffic. Each fragment of a tile that is read from threadgroup memory serves ROWS products, and each
//   element read from device memory the 8 * ROWS * SIMDGROUPS / SPLIT rows of a threadgroup.
//
// Above 256 channels, as forward_shapes.h: 576/512 and 64/512 are DeepSeek's latent vectors. Eight
// simdgroups share the channels where four would need more registers than there are (D = 576 of 16 bits:
// dQ takes 98 with four; dK and dV 132 with four, 81 with eight), and sixteen make up for the rows: 16 a
// threadgroup. Two tiles of 8 rows would fit with half as many simdgroups, for 1.36 times the traffic.
// No product is computed twice, so that all dims cost seven products of their channels, as padded here.
#pragma once

#define UMFA_DQ_SHAPES_16(X)               \
    X(32, 32, 32, 2, 4, 1, false, 7, 10)   \
    X(64, 64, 16, 2, 4, 1, false, 7, 10)   \
    X(80, 80, 32, 1, 4, 1, false, 7, 10)   \
    X(96, 96, 32, 1, 4, 1, false, 7, 10)   \
    X(128, 128, 16, 1, 4, 1, false, 7, 8)  \
    X(128, 128, 32, 1, 4, 1, false, 9, 10) \
    X(160, 160, 16, 1, 8, 2, false, 7, 10) \
    X(192, 128, 16, 1, 8, 2, false, 7, 10) \
    X(192, 192, 16, 1, 8, 2, false, 7, 10) \
    X(256, 256, 16, 1, 8, 2, false, 7, 10) \
    X(64, 512, 16, 1, 8, 4, false, 7, 10)  \
    X(512, 512, 16, 1, 8, 4, true, 7, 10)  \
    X(576, 512, 16, 1, 8, 4, true, 7, 10)

#define UMFA_DQ_SHAPES_32(X)               \
    X(32, 32, 32, 1, 4, 1, false, 7, 10)   \
    X(64, 64, 32, 1, 4, 1, false, 7, 10)   \
    X(80, 80, 16, 1, 4, 1, false, 7, 10)   \
    X(96, 96, 16, 1, 4, 1, false, 7, 10)   \
    X(128, 128, 16, 1, 8, 2, false, 7, 10) \
    X(160, 160, 8, 1, 8, 2, false, 7, 10)  \
    X(192, 128, 8, 1, 8, 2, false, 7, 10)  \
    X(192, 192, 8, 1, 8, 2, false, 7, 10)  \
    X(256, 256, 8, 1, 8, 4, false, 7, 10)  \
    X(64, 512, 8, 1, 16, 8, false, 7, 10)  \
    X(512, 512, 8, 1, 16, 8, true, 7, 10)  \
    X(576, 512, 8, 1, 16, 8, true, 7, 10)

// A lane widens two fragments at once: each simdgroup needs an even number of channel fragments. Eight have
// it with D = 640 and 128, not with 576 and 64.
#define UMFA_DQ_SHAPES_WIDENED(X)         \
    X(32, 32, 32, 2, 4, 1, false, 7, 8)   \
    X(64, 64, 32, 1, 4, 1, false, 7, 8)   \
    X(80, 80, 32, 1, 4, 1, false, 7, 8)   \
    X(96, 96, 16, 1, 4, 1, false, 7, 8)   \
    X(128, 128, 16, 1, 8, 2, false, 7, 8) \
    X(160, 160, 16, 1, 8, 2, false, 7, 8) \
    X(192, 128, 16, 1, 8, 2, false, 7, 8) \
    X(192, 192, 16, 1, 8, 2, false, 7, 8) \
    X(256, 256, 16, 1, 8, 4, false, 7, 8) \
    X(128, 512, 8, 1, 16, 8, false, 7, 8) \
    X(512, 512, 8, 1, 16, 8, true, 7, 8)  \
    X(640, 512, 8, 1, 16, 8, true, 7, 8)

#define UMFA_DKV_SHAPES_16(X)              \
    X(32, 32, 16, 2, 4, 1, false, 7, 10)   \
    X(64, 64, 32, 1, 4, 1, false, 7, 10)   \
    X(80, 80, 16, 1, 4, 1, false, 7, 10)   \
    X(96, 96, 16, 1, 4, 1, false, 7, 10)   \
    X(128, 128, 16, 1, 8, 2, false, 7, 10) \
    X(160, 160, 16, 1, 8, 2, false, 7, 10) \
    X(192, 128, 16, 1, 8, 2, false, 7, 10) \
    X(192, 192, 16, 1, 8, 2, false, 7, 10) \
    X(256, 256, 16, 1, 8, 4, false, 7, 10) \
    X(64, 512, 16, 1, 8, 4, false, 7, 10)  \
    X(512, 512, 8, 1, 16, 8, true, 7, 10)  \
    X(576, 512, 8, 1, 16, 8, true, 7, 10)

#define UMFA_DKV_SHAPES_32(X)              \
    X(32, 32, 32, 1, 4, 1, false, 7, 10)   \
    X(64, 64, 16, 1, 4, 1, false, 7, 10)   \
    X(80, 80, 16, 1, 8, 2, false, 7, 10)   \
    X(96, 96, 16, 1, 8, 2, false, 7, 10)   \
    X(128, 128, 16, 1, 8, 2, false, 7, 10) \
    X(160, 160, 8, 1, 8, 2, false, 7, 10)  \
    X(192, 128, 8, 1, 8, 4, false, 7, 10)  \
    X(192, 192, 8, 1, 8, 4, false, 7, 10)  \
    X(256, 256, 8, 1, 8, 4, false, 7, 10)  \
    X(64, 512, 8, 1, 8, 4, false, 7, 10)   \
    X(512, 512, 8, 1, 16, 8, true, 7, 10)  \
    X(576, 512, 8, 1, 16, 8, true, 7, 10)

// D = 80 does not leave an even number of fragments to two simdgroups.
#define UMFA_DKV_SHAPES_WIDENED(X)        \
    X(32, 32, 16, 2, 4, 1, false, 7, 8)   \
    X(64, 64, 16, 1, 4, 1, false, 7, 8)   \
    X(80, 80, 8, 1, 4, 1, false, 7, 8)    \
    X(96, 96, 16, 1, 8, 2, false, 7, 8)   \
    X(128, 128, 16, 1, 8, 2, false, 7, 8) \
    X(160, 160, 8, 1, 8, 2, false, 7, 8)  \
    X(192, 128, 16, 1, 8, 4, false, 7, 8) \
    X(192, 192, 16, 1, 8, 4, false, 7, 8) \
    X(256, 256, 16, 1, 8, 4, false, 7, 8) \
    X(128, 512, 8, 1, 16, 8, false, 7, 8) \
    X(512, 512, 8, 1, 16, 8, true, 7, 8)  \
    X(640, 512, 8, 1, 16, 8, true, 7, 8)
