// NaN and infinities in values that some queries must not see.
//
// A hidden key has the weight 0, and 0 * NaN is NaN: in the product P V one bad value would reach
// every row of its tile. A check of V before each product would cost every call. Instead, the kernels
// check their result once, at the end. If it is not finite and keys were hidden, they read all keys
// again, in three more passes. The last one replaces the bad values by 0, so rows that do not see
// them get the same bits as if zeros had been there. The other two find what rows do see of them, by
// the same product with weights and values of 0 and 1:
//
//   pass  weights      values                  a result that is not 0 means
//   0     P            V                       (the only pass if all is finite)
//   1     1 if seen    1 for NaN and +inf      add +inf
//   2     1 if seen    1 for NaN and -inf      add -inf; both together: NaN
//   3     P            V, 0 where not finite   the result before these are added
#pragma once

#include "shared/dropout.h"
#include "shared/fragment.h"
#include "shared/scores.h"
#include "shared/threadgroup_memory.h"

namespace umfa {

// By bits, since comparisons with infinity may be folded away.
constant constexpr uint infinity_bits = 0x7f800000u;
constant constexpr uint minus_infinity_bits = 0xff800000u;
constant constexpr uint nan_bits = 0x7fc00000u;

/// Whether one of this lane's elements is NaN or infinite.
inline bool is_spoiled(thread Fragment<float>& frag) {
    const float2 x = pair_of(frag);
    return (as_type<uint>(x.x) & infinity_bits) == infinity_bits ||
           (as_type<uint>(x.y) & infinity_bits) == infinity_bits;
}

/// x with +inf or -inf added, or both.
inline float spoiled(float x, bool up, bool down) {
    if (!up && !down) return x;  // keeps the sign of -0
    return x + as_type<float>(up && down ? nan_bits : up ? infinity_bits : minus_infinity_bits);
}

/// A value as passes 1 to 3 use it.
template <typename M>
inline M guarded(M value, int pass) {
    const uint bits = as_type<uint>(float(value)), size = bits & 0x7fffffffu;
    const uint counted = pass == 1 ? infinity_bits : minus_infinity_bits;
    const float finite = size < infinity_bits ? float(value) : 0.0f;
    const float is_counted = size > infinity_bits ? 1.0f : (bits == counted ? 1.0f : 0.0f);
    return M(pass == 3 ? finite : is_counted);
}

/// Applies `guarded` to a staged tile of V.
template <int ROWS, int D, int ROW, int THREADS, typename M>
inline void guard_rows(threadgroup M* staged, int pass, ushort thread_index) {
    for (int i = thread_index; i < ROWS * D; i += THREADS) {
        threadgroup M* at = staged + i / D * ROW + i % D;
        const M value = *at;
        *at = guarded(value, pass);
    }
}

/// Whether a pass counts what rows see.
inline bool counts(int pass) { return pass == 1 || pass == 2; }

/// Dropout's threshold. Passes that count drop nothing: a dropped key is seen, and 0 * NaN is NaN.
inline uint threshold_of(constant DropoutParams& params, int pass) {
    return counts(pass) ? 0u : params.threshold;
}

/// Scores that give each seen key the weight 1 and each hidden key 0.
inline float2 seen_scores(float2 scores) {
    return float2(scores.x > lowest ? 0.0f : lowest, scores.y > lowest ? 0.0f : lowest);
}

/// The same for the scores of row f in a tile.
template <int QF, int KF>
inline void set_seen(thread Fragment<float> (&scores)[QF][KF], int f) {
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) set_pair(scores[f][j], seen_scores(pair_of(scores[f][j])));
}

/// Stores which elements of O are not 0: two bits for each fragment, in words that lie THREADS apart.
template <int THREADS, int QF, int DVF>
inline void count_spoiled(threadgroup uint* flags, thread Fragment<float> (&o)[QF][DVF]) {
    uint word = 0u;
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * DVF; ++i) {
        const float2 count = pair_of(o[i / DVF][i % DVF]);
        word |= (count.x > 0.0f ? 1u : 0u) << (i % 16 * 2);
        word |= (count.y > 0.0f ? 2u : 0u) << (i % 16 * 2);
        if (i % 16 == 15 || i == QF * DVF - 1) {
            flags[i / 16 * THREADS] = word;
            word = 0u;
        }
    }
}

/// Adds the infinities that passes 1 and 2 have found to O.
template <int THREADS, int QF, int DVF>
inline void spoil(thread Fragment<float> (&o)[QF][DVF], threadgroup const uint* up,
                  threadgroup const uint* down) {
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * DVF; ++i) {
        const uint ups = up[i / 16 * THREADS] >> (i % 16 * 2);
        const uint downs = down[i / 16 * THREADS] >> (i % 16 * 2);
        const float2 x = pair_of(o[i / DVF][i % DVF]);
        set(o[i / DVF][i % DVF], spoiled(x.x, (ups & 1u) != 0u, (downs & 1u) != 0u),
            spoiled(x.y, (ups & 2u) != 0u, (downs & 2u) != 0u));
    }
}

}  // namespace umfa
