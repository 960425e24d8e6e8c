// Copies a tile of Q, K or V into the panels that the micro-kernel reads, converting on the way.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

constexpr int64_t block_kv = 96;  // keys of a tile
/// The same of the forward pass. With matrix registers O is read and written once a tile.
template <class U>
constexpr int64_t keys_of_tile = U::tiles ? 192 : block_kv;

/// dst[0, n) = src[0], src[stride], ...; zeros up to `size`.
template <class S, class Element>
inline void gather(const Element* src, int64_t stride, int64_t n, Element* dst, int64_t size) {
    if (stride == 1) return S::fill(src, n, dst, size);
    for (int64_t i = 0; i < size; ++i) dst[i] = i < n ? src[i * stride] : Element{};
}

/// W numbers from `at` on, `stride` apart; those past `count` are 0.
template <class S>
inline typename S::vf numbers(ElementType element, const char* at, int64_t stride, int64_t count) {
    const auto load = [&](auto type) {
        using T = decltype(type);
        const auto* from = reinterpret_cast<const typename T::storage*>(at);
        if (stride == 1 && count >= S::W) return T::template load<S>(from);
        typename T::storage buffer[S::W];
        gather<S>(from, stride, count < S::W ? count : int64_t{S::W}, buffer, S::W);
        return T::template load<S>(buffer);
    };
    return element == ElementType::f32   ? load(F32{})
           : element == ElementType::f16 ? load(F16{})
                                         : load(BF16{});
}

/// Units [first, first + W) of one row of `channels` elements; zeros past its end.
template <class S, class U>
inline typename S::vf row_units(const typename U::storage* row, int64_t stride, int64_t first,
                                int64_t channels) {
    constexpr int count = S::W * U::E;
    const int64_t left = channels - first * U::E;
    if (stride == 1 && left >= count) return U::from_row(row + first * U::E);
    if (left <= 0) return typename S::vf{};
    if constexpr (sizeof(typename U::storage) == sizeof(float))
        if (stride == 1) return S::load_part(row + first, left);
    typename U::storage buffer[count];
    gather<S>(row + first * U::E * stride, stride, left < count ? left : int64_t{count}, buffer,
              count);
    return U::from_row(buffer);
}

/// W units of rows[0] and rows[1], of channels from `first` on; null rows, and channels past the last,
/// are 0.
template <class S, class U>
inline typename S::vf paired_channels(const typename U::storage* const* rows,
                                      int64_t stride_channel, int64_t first, int64_t channels) {
    using storage = typename U::storage;
    const int64_t left = channels - first;
    if (stride_channel == 1 && left >= S::W && rows[0] && rows[1]) return U::from_rows(rows, first);
    storage buffer[U::E][S::W] = {};
    const storage* part[U::E];
    for (int e = 0; e < U::E; ++e) {
        part[e] = buffer[e];
        if (rows[e])
            gather<S>(rows[e] + first * stride_channel, stride_channel,
                      left < S::W ? left : int64_t{S::W}, buffer[e], S::W);
    }
    return U::from_rows(part, 0);
}

/// Transposes `count` rows (at most `height`): dst[unit * pitch + row], zeros for missing rows.
/// Up to W floats after the panel may be overwritten. Rows hold U::storage, whatever `Row` is.
template <class S, class U, class Row>
inline void pack_transposed(const Row* const* rows, int64_t count, int64_t stride_channel,
                            int64_t height, int64_t pitch, int64_t channels, float* dst) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    const int64_t units = (channels + U::E - 1) / U::E;
    for (int64_t u = 0; u < units; u += W)
        for (int64_t r0 = 0; r0 < height; r0 += W) {
            vf x[W];
            for (int r = 0; r < W; ++r)
                x[r] = r0 + r < count
                           ? row_units<S, U>(
                                 reinterpret_cast<const typename U::storage*>(rows[r0 + r]),
                                 stride_channel, u, channels)
                           : vf{};
            S::transpose(x);
            // Where pitch < W each store runs into the next unit's place, which is written later.
            const int64_t left = units - u < W ? units - u : W;
            float* to = dst + u * pitch + r0;
            if (left == W)
                for (int i = 0; i < W; ++i) S::store(to + i * pitch, x[i]);
            else
                for (int64_t i = 0; i < left; ++i) S::store(to + i * pitch, x[i]);
        }
}

/// What pack_values() found in a tile of V.
struct PackedValues {
    bool tiny;    // values that U leaves out
    bool finite;  // no inf and no NaN
};

/// dst[unit * pitch + channel] for a tile of V; up to W floats after each row may be written.
/// Rows hold U::storage, whatever `Row` is.
template <class S, class U, class Row>
inline PackedValues pack_values(const Row* const* rows, int64_t count, int64_t stride_channel,
                                int64_t channels, int64_t pitch, float* dst) {
    using storage = typename U::storage;
    constexpr int W = S::W;
    const storage nothing[W] = {};
    bool tiny = false;
    typename S::vf not_finite{};
    const auto put = [&](float* to, typename S::vf x) {
        not_finite += U::times_zero(x);
        if constexpr (U::flushes) x = U::without_tiny(x, tiny);
        S::store(to, x);
    };
    for (int64_t k = 0; k < count; k += U::E, dst += pitch) {
        int64_t c = 0;
        const storage* own[U::E];
        for (int e = 0; e < U::E; ++e)
            own[e] = k + e < count ? reinterpret_cast<const storage*>(rows[k + e]) : nothing;
        if (stride_channel == 1 && k + U::E <= count)
            for (; c + W <= channels; c += W) put(dst + c, U::from_rows(own, c));
        for (; c < channels; c += W) {  // the tail, strided rows, and the last odd one
            const int64_t left = channels - c < W ? channels - c : int64_t{W};
            storage buffer[U::E][W];
            const storage* part[U::E];
            for (int e = 0; e < U::E; ++e) {
                part[e] = k + e < count ? buffer[e] : nothing;
                if (k + e < count)
                    gather<S>(own[e] + c * stride_channel, stride_channel, left, buffer[e], W);
            }
            put(dst + c, U::from_rows(part, 0));
        }
    }
    bool finite = true;
    for (int i = 0; i < W; ++i) finite &= not_finite[i] == 0;
    return {tiny, finite};
}

/// Writes W rows of `channels` elements from their transpose, x[channel * pitch + lane], each lane
/// divided by its `divisor` (0: the row is 0). Only the first `rows` are stored.
template <class S, class T>
inline void store_transposed(const float* x, int64_t pitch, const float* divisor, int64_t rows,
                             int64_t channels, typename T::storage* dst, const Rows& layout) {
    using vf = typename S::vf;
    using storage = typename T::storage;
    constexpr int W = S::W;
    const vf by = S::load(divisor), inverse = 1.f / by;
    for (int64_t c = 0; c < channels; c += W) {
        const int64_t count = channels - c < W ? channels - c : W;
        vf y[W];
        for (int i = 0; i < W; ++i) {
            // A quotient from the reciprocal and one correction (Markstein 1990): division itself
            // took 12 % of a cross-attention with 77 keys.
            const vf dividend = i < count ? S::load(x + (c + i) * pitch) : vf{};
            const vf quotient = dividend * inverse, rest = dividend - quotient * by;
            y[i] = rest == rest ? quotient + rest * inverse : quotient;
            y[i] = by == 0.f ? vf{} : y[i];
        }
        S::transpose(y);
        storage* to = dst + c * layout.stride_channel;
        for (int r = 0; r < W && r < rows; ++r, to += layout.stride_row) {
            if (count == W && layout.stride_channel == 1) {
                T::template store<S>(to, y[r]);
                continue;
            }
            if constexpr (sizeof(storage) == sizeof(float))
                if (layout.stride_channel == 1) {
                    S::store_part(to, y[r], count);
                    continue;
                }
            storage buffer[W];
            T::template store<S>(buffer, y[r]);
            if (layout.stride_channel == 1)
                S::copy(buffer, count, to);
            else
                for (int64_t i = 0; i < count; ++i) to[i * layout.stride_channel] = buffer[i];
        }
    }
}

}  // namespace
}  // namespace umfa::cpu
