#include "core/dlpack_view.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "core/error.h"

namespace umfa {
namespace {

// By DLPack's dtype code; those above bool are younger than many headers, and name their own width.
constexpr const char* code_names[] = {"int",
                                      "uint",
                                      "float",
                                      "opaque",
                                      "bfloat",
                                      "complex",
                                      "bool",
                                      "float8_e3m4",
                                      "float8_e4m3",
                                      "float8_e4m3b11fnuz",
                                      "float8_e4m3fn",
                                      "float8_e4m3fnuz",
                                      "float8_e5m2",
                                      "float8_e5m2fnuz",
                                      "float8_e8m0fnu",
                                      "float6_e2m3fn",
                                      "float6_e3m2fn",
                                      "float4_e2m1fn"};
constexpr int code_bool = 6, first_small_float = 7, last_small_float = 17;
constexpr int code_float8_e4m3fn = 10, code_float8_e5m2 = 12;

std::string dlpack_dtype_text(const DLDataType& dtype) {
    std::string text;
    if (dtype.code <= last_small_float)
        text = code_names[dtype.code];
    else
        text.append("DLPack dtype code ").append(std::to_string(dtype.code)).append(" of bits ");
    if (dtype.code < code_bool || dtype.code > last_small_float) text += std::to_string(dtype.bits);
    if (dtype.lanes != 1) text += "x" + std::to_string(dtype.lanes);
    return text;
}

std::string dlpack_device_text(const DLDevice& device) {
    const int type = static_cast<int>(device.device_type);
    switch (type) {
        case 2: return "cuda:" + std::to_string(device.device_id);
        case 7: return "vulkan:" + std::to_string(device.device_id);
        case 10: return "rocm:" + std::to_string(device.device_id);
        default:
            return "DLPack device type " + std::to_string(type) + ", id " +
                   std::to_string(device.device_id);
    }
}

const char* expected_dtype(std::string_view argument) {
    static constexpr std::string_view tables[] = {
#define UMFA_TABLE(name, text) #name,
#include "core/options.def"
        "cache_seqlens", "cu_seqlens", "page_table"};  // other spellings of some
    if (std::find(std::begin(tables), std::end(tables), argument) != std::end(tables))
        return "int32 or int64";
    return argument == "attn_mask" ? "bool, float32, float16 or bfloat16"
                                   : "float32, float16 or bfloat16";
}

DType dtype_of(const DLDataType& dtype, std::string_view function, std::string_view argument) {
    if (dtype.lanes == 1) {
        switch (dtype.code) {
            case kDLFloat:
                if (dtype.bits == 32) return DType::f32;
                if (dtype.bits == 16) return DType::f16;
                if (dtype.bits == 64) return DType::f64;
                break;
            case kDLBfloat:
                if (dtype.bits == 16) return DType::bf16;
                break;
            case kDLInt:
                if (dtype.bits == 4) return DType::i4;
                if (dtype.bits == 8) return DType::i8;
                if (dtype.bits == 32) return DType::i32;
                if (dtype.bits == 64) return DType::i64;
                break;
            case kDLUInt:
                if (dtype.bits == 8) return DType::u8;
                break;
            case kDLBool:
                if (dtype.bits == 8) return DType::b8;
                break;
            case code_float8_e4m3fn: return DType::f8e4m3;
            case code_float8_e5m2: return DType::f8e5m2;
            default: break;
        }
    }
    const bool small_float = dtype.code >= first_small_float && dtype.code <= last_small_float;
    fail(small_float ? ErrorKind::unsupported : ErrorKind::type, function,
         std::string(argument) + " has the wrong dtype", dlpack_dtype_text(dtype),
         expected_dtype(argument));
}

}  // namespace

TensorView view_of(const DLTensor& tensor, std::string_view function, std::string_view argument) {
    TensorView view;
    switch (static_cast<int>(tensor.device.device_type)) {
        case kDLCPU: view.device = Device::cpu; break;
        case kDLMetal: view.device = Device::metal; break;
        default:
            fail(ErrorKind::value, function,
                 std::string(argument) + " is on a device umfa cannot read",
                 dlpack_device_text(tensor.device), "cpu or metal");
    }
    view.dtype = dtype_of(tensor.dtype, function, argument);
    // The least number depends on the argument, whose own check follows.
    if (tensor.ndim < 0 || tensor.ndim > TensorView::max_ndim)
        fail(ErrorKind::value, function,
             std::string(argument) + " has an impossible number of dimensions",
             std::to_string(tensor.ndim),
             tensor.ndim < 0 ? "0 or more" : "at most " + std::to_string(TensorView::max_ndim));
    if (tensor.ndim > 0 && tensor.shape == nullptr)
        fail(ErrorKind::value, function, std::string(argument) + " has no shape", "NULL",
             "an array of " + std::to_string(tensor.ndim) + " sizes");
    view.data = tensor.data;
    view.byte_offset = tensor.byte_offset;
    view.ndim = tensor.ndim;
    // Frameworks that number their CPU devices (jax) mean the same memory by all of them.
    view.device_id = view.device == Device::cpu ? 0 : tensor.device.device_id;
    int64_t compact = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
        view.shape[i] = tensor.shape[i];
        view.strides[i] = tensor.strides ? tensor.strides[i] : compact;
        if (tensor.shape[i] < 0 || __builtin_mul_overflow(compact, tensor.shape[i], &compact))
            fail(ErrorKind::value, function, std::string(argument) + " has an impossible shape",
                 "size " + std::to_string(tensor.shape[i]) + " in dimension " + std::to_string(i),
                 "sizes >= 0 whose product fits 64 bits");
    }
    return view;
}

std::string shape_text(const TensorView& view) {
    std::string text = "(";
    for (int i = 0; i < view.ndim; ++i) {
        if (i) text += ", ";
        text += std::to_string(view.shape[i]);
    }
    if (view.ndim == 1) text += ",";
    return text + ")";
}

std::string device_text(const TensorView& view) {
    return view.device == Device::cpu ? "cpu" : "metal:" + std::to_string(view.device_id);
}

}  // namespace umfa
