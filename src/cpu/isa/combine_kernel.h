// Weighted sums of rows, for merging the results of parts of the keys.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/simd.h"

namespace umfa::cpu {
namespace {

/// sum += weight * row. `sum` is whole vectors.
template <class S, class T>
void combine_add(const void* row, int64_t stride, int64_t channels, float weight, float* sum) {
    using storage = typename T::storage;
    constexpr int64_t W = S::W;
    const auto* from = static_cast<const storage*>(row);
    const typename S::vf by = S::splat(weight);
    const int64_t whole = stride == 1 ? channels / W * W : 0;
    for (int64_t c = 0; c < whole; c += W)
        S::store(sum + c, S::fma(S::load(sum + c), T::template load<S>(from + c), by));
    for (int64_t c = whole; c < channels; c += W) {
        const int64_t left = channels - c, count = left < W ? left : W;
        storage buffer[W] = {};
        for (int64_t i = 0; i < count; ++i) buffer[i] = from[(c + i) * stride];
        // The same arithmetic as above: bits do not depend on strides.
        S::store(sum + c, S::fma(S::load(sum + c), T::template load<S>(buffer), by));
    }
}

/// row = sum. `sum` is whole vectors.
template <class S, class T>
void combine_store(const float* sum, int64_t channels, void* row, int64_t stride) {
    using storage = typename T::storage;
    constexpr int64_t W = S::W;
    auto* to = static_cast<storage*>(row);
    for (int64_t c = 0; c < channels; c += W) {
        storage buffer[W];
        T::template store<S>(buffer, S::load(sum + c));
        const int64_t left = channels - c, count = left < W ? left : W;
        for (int64_t i = 0; i < count; ++i) to[(c + i) * stride] = buffer[i];
    }
}

}  // namespace
}  // namespace umfa::cpu
