// Rotary position embedding (Su et al. 2021) of one row, rounded to the row's type, as a separate
// pass would.
#pragma once

#include "cpu/isa/pack.h"

namespace umfa::cpu {
namespace {

/// Rotates the row x by the angles of `position`, or with Back by their opposites.
template <class S, bool Back = false>
inline void rotate(const Rotary& rotary, int64_t position, float* x) {
    constexpr int W = S::W, most = max_head_dim / 2 + W;
    float cos[most], sin[most];
    const int64_t half = rotary.channels / 2;
    const auto table = [&](const void* data, int64_t stride_position, int64_t stride_channel,
                           float* to) {
        const char* from =
            static_cast<const char*>(data) + position * stride_position * size_of(rotary.element);
        for (int64_t c = 0; c < half; c += W)
            S::store(to + c,
                     numbers<S>(rotary.element, from + c * stride_channel * size_of(rotary.element),
                                stride_channel, half - c));
    };
    table(rotary.cos, rotary.cos_stride_position, rotary.cos_stride_channel, cos);
    table(rotary.sin, rotary.sin_stride_position, rotary.sin_stride_channel, sin);
    for (int64_t i = 0; i < half; ++i) {
        const int64_t a = rotary.interleaved ? 2 * i : i, b = rotary.interleaved ? a + 1 : i + half;
        const float first = x[a], second = x[b];
        const float sine = Back ? -sin[i] : sin[i];
        x[a] = first * cos[i] - second * sine;
        x[b] = first * sine + second * cos[i];
    }
}

/// dst[0, channels) = the row rotated by the angles of `position`, rounded to its type.
template <class S, class T>
inline void rotate_row(const Rotary& rotary, const typename T::storage* row, int64_t stride,
                       int64_t channels, int64_t position, typename T::storage* dst) {
    constexpr int W = S::W;
    float x[max_head_dim + W];
    for (int64_t c = 0; c < channels; c += W)
        S::store(x + c, row_units<S, FloatUnits<S, T>>(row, stride, c, channels));
    rotate<S>(rotary, position, x);
    int64_t c = 0;
    for (; c + W <= channels; c += W) T::template store<S>(dst + c, S::load(x + c));
    if (c == channels) return;
    typename T::storage tail[W];
    T::template store<S>(tail, S::load(x + c));
    for (int64_t i = 0; c + i < channels; ++i) dst[c + i] = tail[i];
}

/// rotate_row() of a row of element type `type`.
template <class S, class U>
inline void rotate_row_of(ElementType type, const Rotary& rotary, const typename U::storage* row,
                          int64_t stride, int64_t channels, int64_t position,
                          typename U::storage* dst) {
    with_units<S, U>(type, [&](auto units) {
        using T = typename decltype(units)::type;
        rotate_row<S, T>(rotary, reinterpret_cast<const typename T::storage*>(row), stride,
                         channels, position, reinterpret_cast<typename T::storage*>(dst));
    });
}

}  // namespace
}  // namespace umfa::cpu
