// From q.k to what the softmax sees: scale, softcap, ALiBi, causal and window, mask. One definition
// for every kernel, in units of log2.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/params.h"
#include "shared/visible.h"

using namespace metal;

namespace umfa {

// Stands for -inf, which Metal leaves undefined under fast math. No real score comes near. Times a
// scale that waits it is still far below all of them, so that exp2 gives 0.
constant constexpr float lowest = -1.7e38f;
constant constexpr float log2_e = 1.44269504f;
constant constexpr float ln_2 = 0.693147181f;

/// What the scores of one row need.
struct ScoreRow {
    int row;       // of the query
    int diagonal;  // key at its position
    float slope;   // ALiBi, in units of log2
    int64_t mask;  // offset of the row in the mask, in elements
};

/// `batch` is the index of the sequence, whose query i has the position i + offset.
inline ScoreRow score_row(constant ForwardParams& params, device const float* slopes, int batch,
                          int head, int row, int more_keys) {
    ScoreRow found;
    found.row = row;
    found.diagonal = row + more_keys;
    found.slope = 0.0f;
    found.mask = 0;
    if (has_alibi)
        found.slope = slopes[batch * params.slopes_batch + head * params.slopes_head] * log2_e;
    // Rows past the last one are computed and dropped: they read the mask of the last.
    if (has_mask)
        found.mask = batch * params.mask_batch + head * params.mask_head +
                     min(row, params.seqlen_q - 1) * params.mask_row;
    return found;
}

/// One of the floats that masks and sinks may hold. `kind` is a function constant.
inline float number_at(device const uchar* numbers, int kind, int64_t at) {
    if (kind == UMFA_MASK_F32) return reinterpret_cast<device const float*>(numbers)[at];
    if (kind == UMFA_MASK_F16) return float(reinterpret_cast<device const half*>(numbers)[at]);
    if (kind == UMFA_MASK_BF16)
        return as_type<float>(uint(reinterpret_cast<device const ushort*>(numbers)[at]) << 16);
    return 0.0f;
}

/// x in units of log2, or `lowest` for -inf: told by its bits, since comparing with it may be folded
/// away. Other values may be as low as the type goes, which times log2(e) would overflow, and must
/// not hide a key: a row that is all of them weighs all keys alike.
inline float to_log2(float x) {
    return as_type<uint>(x) == 0xff800000u ? lowest : max(x, -1.1e38f) * log2_e;
}

/// The additive mask at one place in units of log2, or `lowest` where the key must not be seen.
inline float mask_at(device const uchar* mask, int64_t at) {
    if (mask_kind == UMFA_MASK_BOOL) return mask[at] != 0 ? 0.0f : lowest;
    return to_log2(number_at(mask, mask_kind, at));
}

/// A head's sink: the logit of one more column of the softmax, which has no value. In units of log2.
inline float sink_at(device const uchar* sinks, int64_t at) {
    return min(to_log2(number_at(sinks, sink_kind, at)), -lowest);
}

/// x = q.k with all that depends on positions alone: with `scale_last` x itself, else in units of
/// log2.
inline float biased(float x, thread const ScoreRow& row, int column,
                    constant ForwardParams& params) {
    if (!scale_last) x *= params.score_scale;
    if (has_softcap) x = params.softcap * precise::tanh(x);
    if (has_alibi) x -= row.slope * abs(float(row.diagonal - column));
    return x;
}

/// A score with the mask added. Hidden keys stay hidden, and their mask is not read: it may lie past
/// the end.
inline float masked(float x, thread const ScoreRow& row, int column, constant ForwardParams& params,
                    device const uchar* mask) {
    if (x <= lowest) return lowest;
    const float added = mask_at(mask, row.mask + column * params.mask_column);
    return added == lowest ? lowest : x + added;
}

}  // namespace umfa
