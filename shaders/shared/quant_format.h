// The quantised formats, to the bit: what a code stands for, how a scale is made and stored, and where
// the code of a channel lies. docs/quantization.md has the same in words.
//
// Included by the shaders (MSL, C++14 subset) and by the host, so that every backend has the same bits.
// Hence no sum of a product (a compiler may fuse it), no quotient (a GPU's may be inexact) but the
// reciprocal that the caller brings, and no subnormal float (a GPU may take it for 0): those made here
// are at least 2^-100, and subnormal ones count as 0.
//
// `codes` and `scales` are constants where a kernel calls these functions, so that compilers remove the
// branches.
#pragma once

#include "shared/visible.h"

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define UMFA_BITS_OF(x) as_type<uint>(x)
#define UMFA_FLOAT_OF(bits) as_type<float>(bits)
#define UMFA_RINT(x) metal::rint(x)
#define UMFA_RESIDUAL(n, spacing, x) metal::fma(-(n), spacing, x)
#define UMFA_FUSED(a, b, c) metal::fma(a, b, c)
#else
#define UMFA_BITS_OF(x) __builtin_bit_cast(uint32_t, x)
#define UMFA_FLOAT_OF(bits) __builtin_bit_cast(float, bits)
#define UMFA_RINT(x) __builtin_rintf(x)
// The product is exact in double. So is the difference, except far from a tie.
#define UMFA_RESIDUAL(n, spacing, x) \
    static_cast<float>(static_cast<double>(x) - static_cast<double>(n) * (spacing))
#define UMFA_FUSED(a, b, c) __builtin_fmaf(a, b, c)
#endif

namespace umfa {

// ---- what a format is made of --------------------------------------------------------------------

// What the bits of one element stand for, before scale and zero point.
#define UMFA_CODES_INT8 0
#define UMFA_CODES_UINT8 1
#define UMFA_CODES_INT4 \
    2  // two's complement; codes of 4 bits: channel 2i in the low half of byte i
#define UMFA_CODES_UINT4 3
#define UMFA_CODES_E4M3 4  // OCP FP8: largest 448, no infinity
#define UMFA_CODES_E5M2 5  // OCP FP8: largest 57344
#define UMFA_CODES_E2M1 6  // OCP FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
#define UMFA_CODES_NF4 7   // 16 quantiles of a normal distribution (Dettmers et al. 2023)
#define UMFA_CODES_Q4_0 8  // GGUF: code - 8; of 32 channels, i and i + 16 share byte i

// How scales are stored.
#define UMFA_SCALES_F32 0
#define UMFA_SCALES_F16 1
#define UMFA_SCALES_BF16 2
#define UMFA_SCALES_E8M0 3    // OCP MX: 2^(bits - 127); 255: NaN
#define UMFA_SCALES_INLINE 4  // GGUF: float16 in front of the codes of 32 channels

// What else a block has: x = (number - zero) * scale, or number * scale + bias.
#define UMFA_OFFSET_NONE 0
#define UMFA_OFFSET_ZERO 1  // a code, in a byte
#define UMFA_OFFSET_BIAS 2  // a number, of the dtype of the scales

#define UMFA_GGUF_BLOCK 32
#define UMFA_MX_BLOCK 32
#define UMFA_SMALLEST_SCALE 7.8886090522101181e-31f  // 2^-100

UMFA_INLINE int bits_of_codes(int codes) {
    return codes == UMFA_CODES_INT8 || codes == UMFA_CODES_UINT8 || codes == UMFA_CODES_E4M3 ||
                   codes == UMFA_CODES_E5M2
               ? 8
               : 4;
}

// ---- where things lie ----------------------------------------------------------------------------

/// Bytes of a row. An odd number of 4-bit codes is padded by a code of 0.
template <typename Int>
UMFA_INLINE Int quant_row_bytes(int codes, int scales, Int channels) {
    const int bits = bits_of_codes(codes);
    if (scales == UMFA_SCALES_INLINE) return channels / UMFA_GGUF_BLOCK * (2 + 4 * bits);
    return bits == 8 ? channels : (channels + 1) / 2;
}

/// A code: bits [shift, shift + bits_of_codes()) of a byte of the row.
template <typename Int>
struct QuantPlace {
    Int byte;
    int shift;
};

template <typename Int>
UMFA_INLINE QuantPlace<Int> quant_place(int codes, int scales, Int channel) {
    const Int block = channel / UMFA_GGUF_BLOCK, in_block = channel % UMFA_GGUF_BLOCK;
    const Int before = scales == UMFA_SCALES_INLINE ? 2 * block + 2 : 0;
    if (codes == UMFA_CODES_Q4_0) {
        const QuantPlace<Int> place = {before + block * 16 + in_block % 16, in_block < 16 ? 0 : 4};
        return place;
    }
    const bool byte = bits_of_codes(codes) == 8;
    const QuantPlace<Int> place = {before + (byte ? channel : channel / 2),
                                   byte || channel % 2 == 0 ? 0 : 4};
    return place;
}

// ---- from codes to numbers -----------------------------------------------------------------------

/// A float of a sign, `exponent` bits that are larger by `excess`, and `fraction` bits. `code` has no
/// other bits. Without infinities and NaN.
UMFA_INLINE float small_float(uint32_t code, int exponent, int fraction, int excess) {
    const uint32_t magnitude = code & ((1u << (exponent + fraction)) - 1u);
    const uint32_t sign = code >> (exponent + fraction) << 31;
    const uint32_t spacing = static_cast<uint32_t>(128 - excess - fraction) << 23;  // of subnormals
    const uint32_t normal =
        (magnitude << (23 - fraction)) + (static_cast<uint32_t>(127 - excess) << 23);
    const float subnormal = static_cast<float>(magnitude) * UMFA_FLOAT_OF(spacing);
    const uint32_t bits = magnitude >> fraction != 0u ? normal : UMFA_BITS_OF(subnormal);
    return UMFA_FLOAT_OF(bits | sign);
}

UMFA_INLINE float nf4_number(uint32_t code) {
    const bool upper = code > 7u;
    const uint32_t i = upper ? code - 8u : 7u - code;  // distance from the middle
    const float above[8] = {
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f,  0.7229568362236023f,  1.0f};
    const float below[8] = {0.0f,
                            -0.09105003625154495f,
                            -0.18477343022823334f,
                            -0.28444138169288635f,
                            -0.39491748809814453f,
                            -0.5250730514526367f,
                            -0.6961928009986877f,
                            -1.0f};
    return upper ? above[i] : below[i];
}

/// What a code stands for, before scale and zero point. `code` has no other bits.
UMFA_INLINE float quant_number(int codes, uint32_t code) {
    if (codes == UMFA_CODES_INT8) return static_cast<float>(static_cast<int>(code ^ 128u) - 128);
    if (codes == UMFA_CODES_INT4) return static_cast<float>(static_cast<int>(code ^ 8u) - 8);
    if (codes == UMFA_CODES_Q4_0) return static_cast<float>(static_cast<int>(code) - 8);
    if (codes == UMFA_CODES_NF4) return nf4_number(code);
    if (codes == UMFA_CODES_E2M1) return small_float(code, 2, 1, 1);
    if (codes == UMFA_CODES_E4M3) {
        if ((code & 0x7fu) == 0x7fu) return UMFA_FLOAT_OF(0x7fc00000u);
        return small_float(code, 4, 3, 7);
    }
    if (codes == UMFA_CODES_E5M2) {
        // The upper byte of a float16.
        if ((code & 0x7fu) > 0x7cu) return UMFA_FLOAT_OF(0x7fc00000u);
        if ((code & 0x7fu) == 0x7cu) return UMFA_FLOAT_OF(0x7f800000u | code >> 7 << 31);
        return small_float(code, 5, 2, 15);
    }
    return static_cast<float>(code);
}

/// The value of a stored scale, or bias. A subnormal float32 or bfloat16 counts as 0, and so does the
/// smallest e8m0.
UMFA_INLINE float quant_scale(int scales, uint32_t bits) {
    if (scales == UMFA_SCALES_F16 || scales == UMFA_SCALES_INLINE) {
        const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
        if (magnitude >= 0x7c00u)
            return UMFA_FLOAT_OF(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
        const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        const uint32_t found =
            magnitude < 0x400u ? UMFA_BITS_OF(subnormal) : (magnitude << 13) + 0x38000000u;
        return UMFA_FLOAT_OF(sign | found);
    }
    uint32_t wide = bits;
    if (scales == UMFA_SCALES_BF16) wide = bits << 16;
    if (scales == UMFA_SCALES_E8M0) wide = bits == 255u ? 0x7fc00000u : bits << 23;
    if ((wide & 0x7f800000u) == 0u) wide &= 0x80000000u;
    return UMFA_FLOAT_OF(wide);
}

/// The element of a block: `offset` is its zero point as a number, or its bias.
UMFA_INLINE float dequantized(int offset_kind, float number, float scale, float offset) {
    if (offset_kind == UMFA_OFFSET_BIAS) return UMFA_FUSED(number, scale, offset);
    return (number - offset) * scale;
}

// ---- from numbers to scales ----------------------------------------------------------------------

/// What one block holds: bits of the largest |x|, and with zero points min(x, 0) and max(x, 0).
struct QuantRange {
    uint32_t magnitude;
    float low, high;
};

/// The scale before it is stored, of a block that is finite and not all 0.
UMFA_INLINE float quant_step(int codes, QuantRange range) {
    const uint32_t magnitude = range.magnitude;
    const float largest = UMFA_FLOAT_OF(magnitude);
    float spacing = largest;  // NF4
    // 1 / 127, 1 / 7, 1 / 448 and 1 / 57344 as floats.
    if (codes == UMFA_CODES_INT8) spacing = largest * 0.00787401575f;
    if (codes == UMFA_CODES_INT4) spacing = largest * 0.142857143f;
    if (codes == UMFA_CODES_E4M3) spacing = largest * 0.00223214286f;
    if (codes == UMFA_CODES_E5M2) spacing = largest * 1.74386161e-5f;
    // 2 / 255 and 2 / 15, a little larger, so that no rounding makes high - low more steps than that.
    const float half_range = 0.5f * range.high - 0.5f * range.low;  // the products are exact
    if (codes == UMFA_CODES_UINT8) spacing = half_range * 0.00784325599670410156f;
    if (codes == UMFA_CODES_UINT4) spacing = half_range * 0.13333511352539062f;
    return spacing < UMFA_SMALLEST_SCALE ? UMFA_SMALLEST_SCALE : spacing;
}

/// The smallest float16 that is not less than `spacing` > 0, which is normal; infinity's bits if none.
UMFA_INLINE uint32_t float16_above(float spacing) {
    const uint32_t bits = UMFA_BITS_OF(spacing);
    if (bits > 0x477fe000u) return 0x7c00u;  // 65504
    if (bits >= 0x38800000u) return ((bits + 0x1fffu) >> 13) - (112u << 10);
    const float count = spacing * 16777216.0f;
    const uint32_t whole = static_cast<uint32_t>(count);
    return static_cast<float>(whole) < count ? whole + 1u : whole;
}

/// The bits of a block's scale: 0 if it is all 0, those of a NaN if it is not finite or if the dtype has
/// no such scale.
UMFA_INLINE uint32_t quant_scale_bits(int codes, int scales, QuantRange range) {
    const bool finite = range.magnitude < 0x7f800000u;
    if (range.magnitude == 0u) return 0u;
    if (scales == UMFA_SCALES_E8M0) {
        // The exponents of the largest |x| and of the largest number become equal.
        const int largest = codes == UMFA_CODES_E2M1 ? 2 : 8;
        const int exponent = static_cast<int>(range.magnitude >> 23) - largest;
        return !finite ? 255u : exponent < 27 ? 27u : static_cast<uint32_t>(exponent);
    }
    const float spacing = quant_step(codes, range);
    if (scales == UMFA_SCALES_F16) {
        const uint32_t bits = finite ? float16_above(spacing) : 0x7c00u;
        return bits == 0x7c00u ? 0x7e00u : bits;
    }
    return finite ? UMFA_BITS_OF(spacing) : 0x7fc00000u;
}

/// Whether these bits are the NaN that quant_scale_bits() makes: then all codes of the block are 0.
UMFA_INLINE bool is_poison(int scales, uint32_t bits) {
    return bits == (scales == UMFA_SCALES_F16    ? 0x7e00u
                    : scales == UMFA_SCALES_E8M0 ? 255u
                                                 : 0x7fc00000u);
}

// ---- from numbers to codes -----------------------------------------------------------------------

/// A scale as quant_code() needs it: `inverse` is 1 / value correctly rounded, 0 if value is 0.
struct QuantScale {
    float value, inverse;
};

/// The integer nearest to x / scale, ties to even, exactly. |x / scale| is at most 256.
UMFA_INLINE int nearest_multiple(float x, QuantScale scale) {
    float n = UMFA_RINT(x * scale.inverse);  // the nearest, or beside it
    const float rest = UMFA_RESIDUAL(n, scale.value, x), half_step = 0.5f * scale.value;
    const bool odd = (static_cast<int>(n) & 1) != 0;
    const bool up = rest > half_step || (rest == half_step && odd);
    const bool down = rest < -half_step || (rest == -half_step && odd);
    n += up ? 1.0f : down ? -1.0f : 0.0f;
    return static_cast<int>(n);
}

/// The nearest such float, ties to even, at most `largest`. Of NaN `largest`.
UMFA_INLINE uint32_t small_float_code(float x, int exponent, int fraction, int excess,
                                      float largest) {
    const uint32_t bits = UMFA_BITS_OF(x), sign = bits >> 31 << (exponent + fraction);
    const uint32_t most = UMFA_BITS_OF(largest), magnitude = bits & 0x7fffffffu;
    const uint32_t kept = magnitude < most ? magnitude : most;
    const uint32_t spacing = static_cast<uint32_t>(126 + excess + fraction)
                             << 23;  // 1 / of subnormals
    const uint32_t first_normal = static_cast<uint32_t>(128 - excess) << 23;
    const uint32_t odd = kept >> (23 - fraction) & 1u;
    const uint32_t normal = ((kept + (1u << (22 - fraction)) - 1u + odd) >> (23 - fraction)) -
                            (static_cast<uint32_t>(127 - excess) << fraction);
    const float steps = UMFA_FLOAT_OF(kept) * UMFA_FLOAT_OF(spacing);
    // Most floats have too many steps for an integer.
    const uint32_t subnormal = kept < first_normal ? static_cast<uint32_t>(UMFA_RINT(steps)) : 0u;
    return sign | (kept < first_normal ? subnormal : normal);
}

/// The number of midpoints between neighbours that, times the scale, are less than x.
UMFA_INLINE uint32_t nf4_code(float x, float scale) {
    const float middles[15] = {-0.8480964f, -0.6106329f,  -0.45999527f,  -0.33967942f,
                               -0.2346074f, -0.13791174f, -0.045525018f, 0.03979015f,
                               0.12025525f, 0.20352125f,  0.29201376f,   0.38931254f,
                               0.50166345f, 0.6427869f,   0.86147845f};
    uint32_t code = 0u;
    for (int i = 0; i < 15; ++i) code += x > middles[i] * scale ? 1u : 0u;
    return scale == 0.0f ? 7u : code;
}

UMFA_INLINE int clamped(int n, int least, int most) {
    return n < least ? least : n > most ? most : n;
}

/// The zero point of a block: the code that stands for 0.
UMFA_INLINE int quant_zero(int codes, float low, QuantScale scale) {
    return clamped(nearest_multiple(-low, scale), 0, codes == UMFA_CODES_UINT8 ? 255 : 15);
}

/// The code of x in a block that is finite.
UMFA_INLINE uint32_t quant_code(int codes, float x, QuantScale scale, int zero) {
    if (codes == UMFA_CODES_INT8)
        return static_cast<uint32_t>(clamped(nearest_multiple(x, scale), -127, 127)) & 255u;
    if (codes == UMFA_CODES_INT4)
        return static_cast<uint32_t>(clamped(nearest_multiple(x, scale), -7, 7)) & 15u;
    if (codes == UMFA_CODES_UINT8)
        return static_cast<uint32_t>(clamped(nearest_multiple(x, scale) + zero, 0, 255));
    if (codes == UMFA_CODES_UINT4)
        return static_cast<uint32_t>(clamped(nearest_multiple(x, scale) + zero, 0, 15));
    if (codes == UMFA_CODES_E4M3) return small_float_code(x * scale.inverse, 4, 3, 7, 448.0f);
    if (codes == UMFA_CODES_E5M2) return small_float_code(x * scale.inverse, 5, 2, 15, 57344.0f);
    if (codes == UMFA_CODES_E2M1) return small_float_code(x * scale.inverse, 2, 1, 1, 6.0f);
    return nf4_code(x, scale.value);
}

}  // namespace umfa
