// Element types. The forward pass computes on f32, f16 and bf16; the others are operands of masks
// and index tables, or of the quantised formats that Problem has a place for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>

namespace umfa {

enum class DType : uint8_t { f32, f16, bf16, f64, f8e4m3, f8e5m2, i4, i8, u8, i32, i64, b8 };

constexpr int bits_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64: return 64;
        case DType::f32:
        case DType::i32: return 32;
        case DType::f16:
        case DType::bf16: return 16;
        case DType::i4: return 4;
        case DType::f8e4m3:
        case DType::f8e5m2:
        case DType::i8:
        case DType::u8:
        case DType::b8: return 8;
    }
    return 0;
}

constexpr const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f64: return "float64";
        case DType::f32: return "float32";
        case DType::f16: return "float16";
        case DType::bf16: return "bfloat16";
        case DType::f8e4m3: return "float8_e4m3fn";
        case DType::f8e5m2: return "float8_e5m2";
        case DType::i4: return "int4";
        case DType::i8: return "int8";
        case DType::u8: return "uint8";
        case DType::i32: return "int32";
        case DType::i64: return "int64";
        case DType::b8: return "bool";
    }
    return "unknown";
}

/// The element type of that name; nullopt if there is none.
constexpr std::optional<DType> dtype_named(std::string_view name) {
    for (int i = 0; i <= static_cast<int>(DType::b8); ++i)
        if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
    return {};
}

constexpr bool is_attention_dtype(DType dtype) {
    return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

/// A float type that attention could be asked for, but that no backend computes on yet.
constexpr bool is_other_float(DType dtype) {
    return dtype == DType::f64 || dtype == DType::f8e4m3 || dtype == DType::f8e5m2;
}

/// The number that the bits of a bfloat16 or float16 say.
inline float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline float half_to_float(uint16_t bits) {
    using limits = std::numeric_limits<float>;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31  ? (fraction ? limits::quiet_NaN() : limits::infinity())
                  : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                  : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits >> 15 ? -value : value;
}

/// The nearest bfloat16 or float16, ties to even.
inline uint16_t bfloat16_from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t half_from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
    if (magnitude < 0x38800000) {  // subnormal: adding a float rounds it
        const float shifted = std::fabs(x) + 0.5f;
        std::memcpy(&bits, &shifted, sizeof bits);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<uint16_t>(sign |
                                 (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace umfa
