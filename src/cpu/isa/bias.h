// A dense mask in units of log2, laid out as the scores: -inf where a key is hidden.
#pragma once

#include "cpu/isa/lanes.h"
#include "cpu/isa/pack.h"

namespace umfa::cpu {
namespace {

/// W elements of a mask from `at` on, `stride` apart; those past `count` are 0.
template <class S>
inline typename S::vf mask_values(ElementType element, const char* at, int64_t stride,
                                  int64_t count) {
    if (element != ElementType::boolean) {
        // float32's lowest number does not hide a key, but times log2(e) it would be -inf.
        const typename S::vf b = numbers<S>(element, at, stride, count), scaled = b * log2_e;
        const typename S::vf lowest = S::splat(-3.4028234663852886e38f);
        const auto sunk = (scaled < lowest) & (b >= lowest);
        return sunk ? lowest : scaled;
    }
    uint8_t bytes[S::W];
    const auto* from = reinterpret_cast<const uint8_t*>(at);
    if (stride != 1 || count < S::W) {
        for (int i = 0; i < S::W; ++i) bytes[i] = i < count ? from[i * stride] : uint8_t{1};
        from = bytes;
    }
    const typename S::vu seen = S::load_u8(from);
    return seen != 0u ? typename S::vf{} : S::splat(-__builtin_inff());
}

inline const char* mask_at(const Mask& mask, int64_t batch, int64_t head, int64_t row,
                           int64_t key) {
    return static_cast<const char*>(mask.data) +
           (batch * mask.stride_batch + head * mask.stride_head + row * mask.stride_row +
            key * mask.stride_key) *
               size_of(mask.element);
}

/// to[key][lane] for the keys [first, last) of a tile that begins at `tile`, and `rows` queries
/// from `row` on. Writes whole vectors of keys: up to W - 1 keys past `last`.
///
/// The next tile is fetched meanwhile, since hardware does not foresee a short piece of each of many
/// rows: waiting for a float32 mask of 2048 x 2048 took 17 % of the forward pass, now 8 % (Zen 5).
template <class S>
inline void mask_panel(const Mask& mask, int64_t batch, int64_t head, int64_t row, int64_t rows,
                       int64_t tile, int64_t first, int64_t last, float* to) {
    using vf = typename S::vf;
    constexpr int W = S::W, N = S::nv * S::W;
    const int64_t ahead = block_kv * mask.stride_key * size_of(mask.element);
    for (int64_t k = first; k < last; k += W) {
        const int64_t count = last - k;
        if (mask.stride_row == 0) {  // the same for every query
            const vf x = mask_values<S>(mask.element, mask_at(mask, batch, head, row, tile + k),
                                        mask.stride_key, count);
            for (int i = 0; i < W; ++i)
                for (int n = 0; n < S::nv; ++n) S::store(to + (k + i) * N + n * W, S::splat(x[i]));
            continue;
        }
        for (int n = 0; n < S::nv; ++n) {
            vf x[W];
            for (int r = 0; r < W; ++r) {
                x[r] = vf{};
                if (n * W + r >= rows) continue;
                const char* at = mask_at(mask, batch, head, row + n * W + r, tile + k);
                __builtin_prefetch(at + ahead, 0, 2);
                x[r] = mask_values<S>(mask.element, at, mask.stride_key, count);
            }
            S::transpose(x);
            for (int i = 0; i < W; ++i) S::store(to + (k + i) * N + n * W, x[i]);
        }
    }
}

}  // namespace
}  // namespace umfa::cpu
