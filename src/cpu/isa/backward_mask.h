// Writes the gradient of a mask.
#pragma once

#include "cpu/isa/bias.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

/// Writes gradients of `count` rows of a mask from `scores`, [key][lane], for the keys
/// [first_key, last_key) of a tile.
template <class S>
inline void write_mask(const Mask& mask, const SequenceHead& own, int64_t query, int64_t count,
                       int64_t first_tile_key, int64_t first_key, int64_t last_key,
                       const float* scores) {
    constexpr int W = S::W, N = S::nv * S::W;
    with_units<S, AnyUnits<S>>(mask.element, [&](auto units) {
        using T = typename decltype(units)::type;
        using storage = typename T::storage;
        for (int64_t k = first_key; k < last_key; k += W)
            for (int64_t n = 0; n < N && n < count; n += W) {
                typename S::vf x[W];
                for (int i = 0; i < W; ++i)
                    x[i] = k + i < last_key ? S::load(scores + (k + i) * N + n) : typename S::vf{};
                S::transpose(x);
                const int64_t keys_left = last_key - k < W ? last_key - k : W;
                for (int r = 0; r < W && n + r < count; ++r) {
                    auto* to = reinterpret_cast<storage*>(const_cast<char*>(
                        mask_at(mask, own.sequence, own.head, query + n + r, first_tile_key + k)));
                    if (keys_left == W && mask.stride_key == 1) {
                        T::template store<S>(to, x[r]);
                        continue;
                    }
                    storage buffer[W];
                    T::template store<S>(buffer, x[r]);
                    for (int64_t i = 0; i < keys_left; ++i) to[i * mask.stride_key] = buffer[i];
                }
            }
    });
}

}  // namespace
}  // namespace umfa::cpu
