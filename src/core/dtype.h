// Element types. The forward pass computes on f32, f16 and bf16; the others are operands of masks
// and index tables, or of the quantised formats that Problem has a place for.
#pragma once

#include <cstdint>

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

constexpr bool is_attention_dtype(DType dtype) {
    return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

/// A float type that attention could be asked for, but that no backend computes on yet.
constexpr bool is_other_float(DType dtype) {
    return dtype == DType::f64 || dtype == DType::f8e4m3 || dtype == DType::f8e5m2;
}

}  // namespace umfa
