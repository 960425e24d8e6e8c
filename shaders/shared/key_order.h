// The order in which keys lie in a tile of the forward kernel.
//
// A lane holds two adjacent columns of each fragment of scores. If keys lay in their own order, it would
// read a mask in as many small pieces as the tile has fragments. With `mask_runs`, a tile's keys are
// staged so that a lane's columns of several fragments are consecutive keys, whose mask one load reads.
// The softmax does not depend on the order of the keys, and K and V have the same one.
#pragma once

#include "shared/constants.h"

namespace umfa {

/// Number of fragments in a run. A lane's columns of these fragments are consecutive keys, and one load
/// of at most 16 bytes reads their mask. KF: fragments of a tile.
template <int KF>
inline int run_fragments() {
    return !mask_runs ? 1 : mask_kind == UMFA_MASK_F32 && KF > 2 ? 2 : KF;
}

/// First of a lane's two keys in fragment j of a tile, counted from the tile's first key. `column`: the
/// lane's first column in a fragment.
template <int KF>
inline int key_column(int j, int column) {
    const int run = run_fragments<KF>();
    return j / run * run * 8 + column * run + j % run * 2;
}

/// Row of a tile of KEYS rows in which a key lies. Column c of fragment j is row 8 j + c.
template <int KEYS>
inline int key_slot(int key) {
    const int run = run_fragments<KEYS / 8>();
    if (run == 1) return key;
    const int group = key / (8 * run) * run;  // its first fragment
    return (group + key / 2 % run) * 8 + key % (8 * run) / (2 * run) * 2 + key % 2;
}

}  // namespace umfa
