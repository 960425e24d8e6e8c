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

/// Compares bits, because fast math may remove a comparison with infinity.
inline bool is_minus_infinity(float x) { return as_type<uint>(x) == 0xff800000u; }

/// A mask may hold the lowest finite value, which would overflow when multiplied by log2(e). Unlike
/// -inf, it must not hide a key: if it fills a row, all keys get the same weight.
inline float at_least_finite(float x) { return max(x, -1.1e38f); }

/// x in units of log2, or `lowest` for -inf.
inline float to_log2(float x) {
    return is_minus_infinity(x) ? lowest : at_least_finite(x) * log2_e;
}

/// Size of an element of the mask.
inline int mask_bytes() {
    return mask_kind == UMFA_MASK_F32 ? 4 : mask_kind == UMFA_MASK_BOOL ? 1 : 2;
}

/// Bits of two neighbouring elements of the mask. With `wide_mask`, those of both are in x.
inline uint2 mask_bits(device const uchar* mask, int64_t row, int column, int seqlen_kv,
                       constant ForwardParams& params) {
    // The start of the row first: it stays the same, and what follows has 32 bits, which one
    // instruction adds. Columns past the last key read the last key's mask, which avoids a branch.
    const int last = seqlen_kv - 1;
    device const uchar* from = mask + row * mask_bytes();
    if (wide_mask) {
        const int at = min(column, last & ~1);
        if (mask_kind == UMFA_MASK_F32)
            return *reinterpret_cast<device const uint2*>(from + int64_t(at) * 4);
        if (mask_kind == UMFA_MASK_BOOL)
            return uint2(*reinterpret_cast<device const ushort*>(from + at), 0u);
        return uint2(*reinterpret_cast<device const uint*>(from + int64_t(at) * 2), 0u);
    }
    const int64_t stride = unit_mask ? 1 : params.mask_column;
    const int64_t first = min(column, last) * stride;
    const int64_t second = min(column + 1, last) * stride;
    if (mask_kind == UMFA_MASK_F32)
        return uint2(reinterpret_cast<device const uint*>(from)[first],
                     reinterpret_cast<device const uint*>(from)[second]);
    if (mask_kind == UMFA_MASK_BOOL) return uint2(from[first], from[second]);
    return uint2(reinterpret_cast<device const ushort*>(from)[first],
                 reinterpret_cast<device const ushort*>(from)[second]);
}

/// The elements; of a bool mask, 1 if the key is visible, else 0.
inline float2 mask_elements(uint2 bits) {
    uint first = bits.x;
    uint second = bits.y;
    if (mask_kind == UMFA_MASK_F32) return float2(as_type<float>(first), as_type<float>(second));
    if (mask_kind == UMFA_MASK_BOOL) {
        if (wide_mask) second = first & 0xff00u;
        if (wide_mask) first &= 0xffu;
        return float2(first != 0u ? 1.0f : 0.0f, second != 0u ? 1.0f : 0.0f);
    }
    if (wide_mask) second = first >> 16;
    first &= 0xffffu;
    if (mask_kind == UMFA_MASK_F16)
        return float2(float(as_type<half>(ushort(first))), float(as_type<half>(ushort(second))));
    return float2(as_type<float>(first << 16), as_type<float>(second << 16));
}

/// A head's sink: the logit of one more column of the softmax, which has no value. In units of log2.
inline float sink_at(device const uchar* sinks, int64_t at) {
    return min(to_log2(number_at(sinks, sink_kind, at)), -lowest);
}

/// x = q.k with all that depends on positions alone: with `scale_last` x itself, else in units of
/// log2. `scale`: params.score_scale.
inline float biased(float x, thread const ScoreRow& row, int column, float scale,
                    constant ForwardParams& params) {
    if (!scale_last) x *= scale;
    if (has_softcap) x = params.softcap * precise::tanh(x);
    if (has_alibi) x -= row.slope * abs(float(row.diagonal - column));
    return x;
}

/// A score with one element of the mask, `lowest` where it hides the key. `unit`: params.mask_unit.
inline float masked(float x, float element, float unit) {
    if (mask_kind == UMFA_MASK_BOOL) return element != 0.0f ? x : lowest;
    const float added = mask_kind == UMFA_MASK_F16 ? element : at_least_finite(element);
    return is_minus_infinity(element) ? lowest : fma(added, unit, x);
}

/// Applies two neighbouring elements of the mask to the scores of their keys.
inline float2 masked(float2 x, uint2 bits, float unit) {
    const float2 elements = mask_elements(bits);
    return float2(masked(x.x, elements.x, unit), masked(x.y, elements.y, unit));
}

/// Scores that began with these elements of the mask: `lowest` where they hide the key, whatever its
/// products are.
inline float2 hidden_again(float2 x, uint2 bits, float unit) {
    const float2 began = masked(float2(0.0f), bits, unit);
    return float2(began.x <= lowest ? lowest : x.x, began.y <= lowest ? lowest : x.y);
}

}  // namespace umfa
