// Merge of the results that attention found over parts of the keys.
#include <metal_stdlib>

#include "shared/indices.h"
#include "shared/params.h"

using namespace metal;
using namespace umfa;

namespace umfa {

// By bits, since comparisons with infinity may be folded away.
constant constexpr uint exponent_bits = 0x7f800000u;
constant constexpr uint no_key_bits = 0xff800000u;  // -inf: the part saw no key
constant constexpr float smallest = -3.4e38f;
constant constexpr float log2_of_e = 1.44269504f;
constant constexpr float log_of_2 = 0.693147181f;

inline bool saw_keys(float lse) { return as_type<uint>(lse) != no_key_bits; }

/// NaN or +inf: no weight can be computed from it.
inline bool is_undefined(float lse) {
    return saw_keys(lse) && (as_type<uint>(lse) & exponent_bits) == exponent_bits;
}

}  // namespace umfa

/// Each simdgroup merges up to 128 channels of one row: its lanes find the largest log-sum-exp
/// together, then every lane goes over the parts in their order, for four channels.
template <typename T, typename O>
[[kernel]] void umfa_combine_parts(
    device const T* out_partial [[buffer(UMFA_COMBINE_OUT_PARTIAL)]],
    device const float* lse_partial [[buffer(UMFA_COMBINE_LSE_PARTIAL)]],
    device O* out [[buffer(UMFA_COMBINE_OUT)]], device float* lse [[buffer(UMFA_COMBINE_LSE)]],
    constant CombineParams& params [[buffer(UMFA_COMBINE_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    constexpr int PER_LANE = 4;
    const int index = group.x * (threads.x / 32) + simdgroup;
    if (index >= params.rows) return;
    const int row = index / params.heads, head = index % params.heads;
    const int64_t batch = group.z;
    const int first = group.y * PER_LANE * 32 + lane;
    out_partial += batch * params.out_partial.batch + row * params.out_partial.row +
                   head * params.out_partial.head;
    lse_partial += batch * params.lse_partial.batch + row * params.lse_partial.row +
                   head * params.lse_partial.head;
    out += batch * params.out.batch + row * params.out.row + head * params.out.head;

    float reference = smallest;
    bool undefined = false;
    for (int part = lane; part < params.parts; part += 32) {
        const float own = lse_partial[part * params.lse_partial.part];
        if (is_undefined(own))
            undefined = true;
        else if (saw_keys(own))
            reference = max(reference, own);
    }
    reference = simd_max(reference);
    undefined = simd_any(undefined);

    float o[PER_LANE] = {}, sum = 0.0f;
    for (int part = 0; part < params.parts; ++part) {
        const float own = lse_partial[part * params.lse_partial.part];
        if (undefined || !saw_keys(own)) continue;
        const float weight = fast::exp2((own - reference) * log2_of_e);
        sum += weight;
#pragma clang loop unroll(full)
        for (int i = 0; i < PER_LANE; ++i) {
            const int column = first + i * 32;
            if (column < params.head_dim)
                o[i] += float(out_partial[part * params.out_partial.part +
                                          column * params.out_partial.channel]) *
                        weight;
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE; ++i) {
        const int column = first + i * 32;
        float x = sum == 0.0f ? 0.0f : o[i] / sum;
        if (undefined) x = as_type<float>(0x7fc00000u);
        if (column < params.head_dim) out[column * params.out.channel] = O(x);
    }
    if (first != 0) return;
    float x = sum == 0.0f ? as_type<float>(0xff800000u) : reference + log2(sum) * log_of_2;
    if (undefined) x = as_type<float>(0x7fc00000u);
    lse[batch * params.lse.batch + row * params.lse.row + head * params.lse.head] = x;
}

#define UMFA_COMBINE(NAME, ...)                                                       \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_combine_parts<__VA_ARGS__>) \
        umfa_combine_parts<__VA_ARGS__>;

#ifdef UMFA_KERNEL
UMFA_COMBINE(UMFA_KERNEL, UMFA_T, UMFA_O)
#else
UMFA_COMBINE("combine_f16_f16", half, half)
UMFA_COMBINE("combine_f16_bf16", half, bfloat)
UMFA_COMBINE("combine_f16_f32", half, float)
UMFA_COMBINE("combine_bf16_f16", bfloat, half)
UMFA_COMBINE("combine_bf16_bf16", bfloat, bfloat)
UMFA_COMBINE("combine_bf16_f32", bfloat, float)
UMFA_COMBINE("combine_f32_f16", float, half)
UMFA_COMBINE("combine_f32_bf16", float, bfloat)
UMFA_COMBINE("combine_f32_f32", float, float)
#endif
