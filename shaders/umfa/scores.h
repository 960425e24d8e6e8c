// From q.k to what the softmax sees: scale, softcap, ALiBi, causal and window, mask. One definition
// for every kernel, in units of log2.
#pragma once

#include <metal_stdlib>

#include "umfa/indices.h"
#include "umfa/params.h"
#include "umfa/visible.h"

constant bool has_lse [[function_constant(UMFA_CONSTANT_HAS_LSE)]];
constant int mask_kind [[function_constant(UMFA_CONSTANT_MASK_KIND)]];
constant bool has_mask [[function_constant(UMFA_CONSTANT_HAS_MASK)]];
constant bool has_alibi [[function_constant(UMFA_CONSTANT_HAS_ALIBI)]];
constant bool has_softcap [[function_constant(UMFA_CONSTANT_HAS_SOFTCAP)]];
// Scores are q.k alone, and the scale lies between 1e-30 and 1: it can wait for the exponent, where
// it costs nothing.
constant bool scale_last [[function_constant(UMFA_CONSTANT_SCALE_LAST)]];

namespace umfa {

using namespace metal;

// Stands for -inf, which Metal leaves undefined under fast math. No real score comes near. Times a
// scale that waits it is still far below all of them, so that exp2 gives 0.
constant constexpr float lowest = -1.7e38f;
constant constexpr float log2_e = 1.44269504f;
constant constexpr float ln_2 = 0.693147181f;

/// What the scores of one row need.
struct ScoreRow {
    int row;       // of the query
    float slope;   // ALiBi, in units of log2
    int64_t mask;  // offset of the row in the mask, in elements
};

inline ScoreRow score_row(constant ForwardParams& params, device const float* slopes, int batch,
                          int head, int row) {
    ScoreRow found;
    found.row = row;
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

/// The additive mask at one place in units of log2, or `lowest` where the key must not be seen.
inline float mask_at(device const uchar* mask, int64_t at) {
    if (mask_kind == UMFA_MASK_BOOL) return mask[at] != 0 ? 0.0f : lowest;
    float bias = 0.0f;
    if (mask_kind == UMFA_MASK_F32) bias = reinterpret_cast<device const float*>(mask)[at];
    if (mask_kind == UMFA_MASK_F16) bias = float(reinterpret_cast<device const half*>(mask)[at]);
    if (mask_kind == UMFA_MASK_BF16)
        bias = as_type<float>(uint(reinterpret_cast<device const ushort*>(mask)[at]) << 16);
    // -inf by its bits, since comparing with it may be folded away; other values may be as low as
    // the type goes, which times log2(e) would overflow.
    return as_type<uint>(bias) == 0xff800000u || bias < lowest / 2 ? lowest : bias * log2_e;
}

/// x = q.k with all that depends on positions alone: with `scale_last` x itself, else in units of
/// log2.
inline float biased(float x, thread const ScoreRow& row, int column,
                    constant ForwardParams& params) {
    if (!scale_last) x *= params.score_scale;
    if (has_softcap) x = params.softcap * precise::tanh(x);
    if (has_alibi)
        x -= row.slope * abs(float(row.row + params.seqlen_kv - params.seqlen_q - column));
    return x;
}

/// A score with the mask added. Hidden keys stay hidden, and their mask is not read: it may lie past
/// the end.
inline float masked(float x, thread const ScoreRow& row, int column, constant ForwardParams& params,
                    device const uchar* mask) {
    if (x <= lowest) return lowest;
    const float bias = mask_at(mask, row.mask + column * params.mask_column);
    return bias == lowest ? lowest : x + bias;
}

}  // namespace umfa
