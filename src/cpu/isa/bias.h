// A dense mask in units of log2, laid out as the scores: -inf where a key is hidden.
#pragma once

#include "cpu/isa/lanes.h"
#include "cpu/isa/pack.h"

namespace umfa::cpu {
namespace {

/// Numbers of a mask in units of log2. float32's lowest one does not hide a key, but times log2(e) it would
/// be -inf.
template <class S>
inline typename S::vf mask_numbers(typename S::vf b) {
    const typename S::vf scaled = b * log2_e, lowest = S::splat(-3.4028234663852886e38f);
    const auto sunk = (scaled < lowest) & (b >= lowest);
    return sunk ? lowest : scaled;
}

template <class S>
inline typename S::vf mask_booleans(const uint8_t* seen) {
    return S::load_u8(seen) != 0u ? typename S::vf{} : S::splat(-__builtin_inff());
}

/// W elements of a mask from `at` on, `stride` apart; those past `count` are 0.
template <class S>
inline typename S::vf mask_values(ElementType element, const char* at, int64_t stride,
                                  int64_t count) {
    if (element != ElementType::boolean)
        return mask_numbers<S>(numbers<S>(element, at, stride, count));
    uint8_t bytes[S::W];
    const auto* from = reinterpret_cast<const uint8_t*>(at);
    if (stride != 1 || count < S::W) {
        for (int i = 0; i < S::W; ++i) bytes[i] = i < count ? from[i * stride] : uint8_t{1};
        from = bytes;
    }
    return mask_booleans<S>(from);
}

/// The elements of W rows, `pitch` bytes apart, for W keys that follow each other, transposed: `to_pitch`
/// floats from key to key.
template <class S, class Load>
inline void transpose_mask(const char* at, int64_t pitch, Load&& load, float* to,
                           int64_t to_pitch) {
    typename S::vf x[S::W];
    for (int r = 0; r < S::W; ++r) x[r] = load(at + r * pitch);
    S::transpose(x);
    for (int i = 0; i < S::W; ++i) S::store(to + i * to_pitch, x[i]);
}

template <class S>
inline void transpose_mask(ElementType element, const char* at, int64_t pitch, float* to,
                           int64_t to_pitch) {
    const auto numbers_of = [&](auto type) {
        using T = decltype(type);
        transpose_mask<S>(
            at, pitch,
            [](const char* row) {
                return mask_numbers<S>(
                    T::template load<S>(reinterpret_cast<const typename T::storage*>(row)));
            },
            to, to_pitch);
    };
    if (element == ElementType::f32) return numbers_of(F32{});
    if (element == ElementType::f16) return numbers_of(F16{});
    if (element == ElementType::bf16) return numbers_of(BF16{});
    transpose_mask<S>(
        at, pitch,
        [](const char* row) { return mask_booleans<S>(reinterpret_cast<const uint8_t*>(row)); }, to,
        to_pitch);
}

inline const char* mask_at(const Mask& mask, int64_t batch, int64_t head, int64_t row,
                           int64_t key) {
    return static_cast<const char*>(mask.data) +
           (batch * mask.stride_batch + head * mask.stride_head + row * mask.stride_row +
            key * mask.stride_key) *
               size_of(mask.element);
}

/// Fetches the rows [first, last) of a mask for `keys` keys from `key` on: hardware does not foresee a short
/// piece of each of many rows. They are those of the next panel, and are fetched a few at a time between
/// products. A tile of all panels ahead, rows of 8 KiB would fall on few sets of the L2 cache. With a
/// float32 mask of 2048 x 2048, the forward pass takes 1.31 times the time without one, and took 1.42
/// times with all rows at once and a tile ahead (Sapphire Rapids). Always inlined: see prefetch_row().
UMFA_INLINE void fetch_mask(const Mask& mask, int64_t batch, int64_t head, int64_t first,
                            int64_t last, int64_t key, int64_t keys) {
    if (mask.stride_key != 1) return;
    constexpr int64_t line = 64;
    for (int64_t row = first; row < last; ++row) {
        const char* at = mask_at(mask, batch, head, row, key);
        for (int64_t byte = 0; byte < keys * size_of(mask.element); byte += line)
            __builtin_prefetch(at + byte, 0, 2);
    }
}

/// to[key][lane] for the keys [first, last) of a tile that begins at `tile`, and `rows` queries
/// from `row` on. Writes whole vectors of keys: up to W - 1 keys past `last`.
///
template <class S>
inline void mask_panel(const Mask& mask, int64_t batch, int64_t head, int64_t row, int64_t rows,
                       int64_t tile, int64_t first, int64_t last, float* to) {
    using vf = typename S::vf;
    constexpr int W = S::W, N = S::nv * S::W;
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
            const bool whole = mask.stride_key == 1 && count >= W && n * W + W <= rows;
            if (whole) {
                transpose_mask<S>(mask.element, mask_at(mask, batch, head, row + n * W, tile + k),
                                  mask.stride_row * size_of(mask.element), to + k * N + n * W, N);
                continue;
            }
            vf x[W];
            for (int r = 0; r < W; ++r) {
                x[r] = vf{};
                if (n * W + r >= rows) continue;
                x[r] = mask_values<S>(mask.element,
                                      mask_at(mask, batch, head, row + n * W + r, tile + k),
                                      mask.stride_key, count);
            }
            S::transpose(x);
            for (int i = 0; i < W; ++i) S::store(to + (k + i) * N + n * W, x[i]);
        }
    }
}

}  // namespace
}  // namespace umfa::cpu
