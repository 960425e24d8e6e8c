// Shapes of the decode kernel: the one list from which decode.metal instantiates kernels and the
// planner (src/metal/plan_decode.cpp) picks them.
//
// UMFA_DECODE_SHAPES(X) is a list of X(D, DV, QF, SIMDGROUPS), of which the planner takes the first
// that holds the head dims, and of those with the same dims the first whose 8 * QF rows hold the
// queries of a key head (query heads that share it, times seqlen_q); more rows go to more
// threadgroups.
//
// Live floats per lane: O takes QF * DV / 4, Q QF * D / 8 (16-bit fragments) or / 4, and 8 keys on
// their way D / 8 and DV / 8 (16 bits) or twice that. Threadgroup memory holds O of half of the
// simdgroups while they merge: SIMDGROUPS / 2 * QF * 8 * DV floats.
#pragma once

#define UMFA_DECODE_SHAPES(X) \
    X(32, 32, 1, 4)           \
    X(32, 32, 2, 4)           \
    X(64, 64, 1, 4)           \
    X(64, 64, 2, 4)           \
    X(80, 80, 1, 4)           \
    X(80, 80, 2, 4)           \
    X(96, 96, 1, 4)           \
    X(96, 96, 2, 4)           \
    X(128, 128, 1, 4)         \
    X(128, 128, 2, 4)         \
    X(160, 160, 1, 4)         \
    X(192, 128, 1, 4)         \
    X(192, 192, 1, 4)         \
    X(256, 256, 1, 4)
