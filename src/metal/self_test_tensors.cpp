#include "metal/self_test_tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"

namespace umfa::metal {
namespace {

/// The value of one element.
float number_at(const TensorView& view, int64_t index) {
    const char* at = view.address() + index * (bits_of(view.dtype) / 8);
    if (view.dtype == DType::f32) {
        float value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return view.dtype == DType::f16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

/// A number from random bits: any sign and fraction, exponent from 1/8 to 1.
uint16_t half_of(uint32_t bits) {
    return static_cast<uint16_t>((bits & 0x83ffu) | (12u + (bits >> 16 & 3u)) << 10);
}
uint16_t bfloat_of(uint32_t bits) {
    return static_cast<uint16_t>((bits & 0x807fu) | (124u + (bits >> 16 & 3u)) << 7);
}
uint32_t float_of(uint32_t bits) { return (bits & 0x807fffffu) | (124u + (bits >> 29 & 3u)) << 23; }

struct Tolerance {
    double absolute, relative;
};

/// Twice the tests' tolerance against float64 (tests/checks.py), because both backends round.
Tolerance tolerance_of(DType dtype) {
    switch (dtype) {
        case DType::f16: return {2e-3, 2e-3};
        case DType::bf16: return {1e-2, 1.6e-2};
        default: return {4e-5, 2e-5};
    }
}

}  // namespace

uint32_t SelfTestTensors::random() {
    // A linear congruential generator, whose upper bits are mixed into the lower ones.
    state_ = state_ * 1664525u + 1013904223u;
    return (state_ ^ state_ >> 15) * 2654435769u;
}

TensorView SelfTestTensors::make(DType dtype, const Sizes& shape) {
    TensorView view;
    view.dtype = dtype;
    view.ndim = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
        view.shape[i] = shape[static_cast<size_t>(i)];
        view.strides[i] = stride;
        stride *= view.shape[i];
    }
    const int64_t bytes = stride * bits_of(dtype) / 8;
    // Bytes of 0xff are NaN in every dtype.
    memory_.emplace_back(static_cast<size_t>(bytes / 8 + 1), ~uint64_t{0});
    view.data = memory_.back().data();
    return view;
}

TensorView SelfTestTensors::numbers(DType dtype, const Sizes& shape) {
    const TensorView view = make(dtype, shape);
    for (int64_t i = 0; i < view.size(); ++i) {
        const uint32_t bits = random();
        if (dtype == DType::f32) {
            const uint32_t number = float_of(bits);
            std::memcpy(view.address() + 4 * i, &number, sizeof number);
        } else {
            const uint16_t number = dtype == DType::f16 ? half_of(bits) : bfloat_of(bits);
            std::memcpy(view.address() + 2 * i, &number, sizeof number);
        }
    }
    return view;
}

TensorView SelfTestTensors::unwritten(DType dtype, const Sizes& shape) {
    return make(dtype, shape);
}

TensorView SelfTestTensors::table(const std::vector<int32_t>& values) {
    const TensorView view = make(DType::i32, {static_cast<int64_t>(values.size())});
    std::memcpy(view.address(), values.data(), values.size() * sizeof(int32_t));
    return view;
}

TensorView SelfTestTensors::as_float32(const TensorView& view) {
    const TensorView wide = make(DType::f32, {view.shape, view.shape + view.ndim});
    for (int64_t i = 0; i < view.size(); ++i) {
        const float number = number_at(view, i);
        std::memcpy(wide.address() + 4 * i, &number, sizeof number);
    }
    return wide;
}

std::string byte_difference(const std::string& name, const TensorView& got,
                            const TensorView& expected) {
    const int64_t bytes = got.size() * (bits_of(got.dtype) / 8);
    for (int64_t i = 0; i < bytes; ++i) {
        const auto have = static_cast<uint8_t>(got.address()[i]),
                   want = static_cast<uint8_t>(expected.address()[i]);
        if (have != want)
            return "byte " + std::to_string(i) + " of " + name + " is " + std::to_string(have) +
                   ", and " + std::to_string(want) + " on the CPU";
    }
    return {};
}

std::string difference(const std::string& name, const TensorView& got, const TensorView& expected) {
    const Tolerance tolerance = tolerance_of(got.dtype);
    double worst = 0;
    std::string text;
    for (int64_t i = 0; i < got.size(); ++i) {
        const double have = number_at(got, i), want = number_at(expected, i);
        if (have == want) continue;  // infinities too
        const double allowed = tolerance.absolute + tolerance.relative * std::abs(want);
        const double share = std::abs(have - want) / allowed;
        if (share <= std::max(worst, 1.0)) continue;
        // With NaN the comparison above is false. The first NaN is enough to report.
        text = name + "[" + std::to_string(i) + "] is " + text_of(static_cast<float>(have)) +
               ", and " + text_of(static_cast<float>(want)) + " on the CPU";
        if (std::isnan(share)) break;
        worst = share;
    }
    return text;
}

}  // namespace umfa::metal
