// Online softmax over tiles of keys (Milakov & Gimelshein 2018; Dao et al. 2022), one row of an 8x8
// fragment at a time, in exp2.
#pragma once

#include "shared/dropout.h"
#include "shared/fragment.h"
#include "shared/scores.h"

namespace umfa {

/// Exponents are taken relative to `reference`, which need not be the maximum: as long as no score
/// is more than `slack` above it nothing overflows, so it follows the maximum only in such steps.
/// A tile then costs one comparison a lane instead of an exchange between lanes and a pass over O:
/// after the first tile, standard normal scores never move it again. 2^8 leaves half's 65504 and
/// the sum of 2^31 keys in float far away.
struct SoftmaxRow {
    float reference;  // in units of log2; `lowest` before anything was seen
    float sum;        // this lane's share
};

constant constexpr float slack = 8.0f;

inline void start(thread SoftmaxRow& row) {
    row.reference = lowest;
    row.sum = 0.0f;
}

/// Raises the row's reference if the largest score `top` exceeds it by more than `slack`. Returns
/// the factor for the sums so far: exactly 1 for a row whose reference did not change.
inline float follow(thread SoftmaxRow& row, float top, float unit) {
    const float largest = row_max(top);
    const float scaled = largest <= lowest ? lowest : largest * unit;
    if (!(scaled > row.reference + slack)) return 1.0f;
    // A row without a visible key has no sum to rescale, and `lowest` must not enter arithmetic.
    const float factor = row.reference <= lowest ? 0.0f : fast::exp2(row.reference - scaled);
    row.reference = scaled;
    row.sum *= factor;
    return factor;
}

/// Whether any row of the simdgroup must `follow`. All lanes get the same answer.
inline bool must_follow(thread const SoftmaxRow& row, float top, float unit) {
    return simd_any(top * unit > row.reference + slack);
}

/// Reference of the exponents. Before any key was visible it is 0: exp2(lowest) underflows to 0.
inline float base(thread const SoftmaxRow& row) {
    return row.reference <= lowest ? 0.0f : row.reference;
}

/// exp2 of a score relative to the base. NaN passes.
inline float weight(float x, float unit, float base) { return fast::exp2(fma(x, unit, -base)); }

/// Sum over the row's lanes.
inline float total(thread const SoftmaxRow& row) { return row_sum(row.sum); }

/// Takes in what another simdgroup, or another part of the keys, found of the same row.
inline void merge(thread SoftmaxRow& row, float other_reference, float other_sum,
                  thread float& mine, thread float& theirs) {
    const float reference = max(row.reference, other_reference);
    mine = row.reference <= lowest ? 0.0f : fast::exp2(row.reference - reference);
    theirs = other_reference <= lowest ? 0.0f : fast::exp2(other_reference - reference);
    row.reference = reference;
    row.sum = row.sum * mine + other_sum * theirs;
}

/// Factor on O of a row, whose sum is the total: the inverse of it. A sink is a part of the keys
/// whose value is 0. Dropout leaves the sum alone, and makes up for what it takes from O.
inline float finish(thread SoftmaxRow& row, device const uchar* sinks, int64_t sink,
                    float dropout_factor) {
    float mine = 1.0f, theirs;
    if (has_sinks) merge(row, sink_at(sinks, sink), 1.0f, mine, theirs);
    if (has_dropout) mine *= dropout_factor;
    return row.sum == 0.0f ? 0.0f : mine / row.sum;
}

/// Natural log-sum-exp of a row with this total.
inline float log_sum_exp(float reference, float total) {
    return total == 0.0f ? as_type<float>(0xff800000u)  // -inf, as bits
                         : (reference + log2(total)) * ln_2;
}

}  // namespace umfa
