// Shapes of the decode kernels: the one list from which decode.metal and decode_vector.metal instantiate
// kernels and the planner (src/metal/plan_decode.cpp) picks them.
//
// UMFA_DECODE_SHAPES(X) is a list of X(D, DV, QF, SIMDGROUPS), of which the planner takes the first
// that holds the head dims, and of those with the same dims the first whose 8 * QF rows hold the
// queries of a key head (query heads that share it, times seqlen_q); more rows go to more
// threadgroups.
//
// Live floats per lane: O takes QF * DV / 4, Q QF * D / 8 (16-bit fragments) or / 4, and 8 keys on
// their way D / 8 and DV / 8 (16 bits) or twice that. Threadgroup memory holds O of half of the
// simdgroups while they merge: SIMDGROUPS / 2 * QF * 8 * DV floats.
//
// UMFA_VECTOR_SHAPES(X) is a list of X(D, DV, SIMDGROUPS) for a key head with a single row, which would
// leave seven of a fragment's eight rows empty. O takes DV / 8 floats a lane, and the keys on their way
// about 64 (vector_runs).
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

#define UMFA_VECTOR_SHAPES(X) \
    X(32, 32, 4)              \
    X(64, 64, 4)              \
    X(80, 80, 4)              \
    X(96, 96, 4)              \
    X(128, 128, 4)
