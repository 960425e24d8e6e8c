// Parts of quantised tensors in memory, for kernels.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/params.h"
#include "shared/quant_format.h"

using namespace metal;

namespace umfa {

/// 0 for -0, as the CPU takes it. By bits, since negative subnormal numbers keep their sign.
inline float without_minus_zero(float x) {
    const uint bits = as_type<uint>(x);
    return as_type<float>(bits == 0x80000000u ? 0u : bits);
}

/// Elements from the first one of a tensor to the first of a row.
inline int64_t offset_to(constant OperandStrides& strides, int64_t batch, int head, int row) {
    return batch * strides.batch + head * strides.head + row * strides.row;
}

/// The bits of a code.
inline uint code_mask() { return bits_of_codes(code_kind) == 8 ? 255u : 15u; }

/// Bits of element `index` of scales or biases.
inline uint stored_bits(device const uchar* from, int kind, int64_t index) {
    if (kind == UMFA_SCALES_F32) return reinterpret_cast<device const uint*>(from)[index];
    if (kind == UMFA_SCALES_E8M0) return from[index];
    return reinterpret_cast<device const ushort*>(from)[index];
}

/// Writes element `index` of scales.
inline void store_bits(device uchar* to, int kind, int64_t index, uint bits) {
    if (kind == UMFA_SCALES_F32)
        reinterpret_cast<device uint*>(to)[index] = bits;
    else if (kind == UMFA_SCALES_E8M0)
        to[index] = uchar(bits);
    else
        reinterpret_cast<device ushort*>(to)[index] = ushort(bits);
}

}  // namespace umfa
