// Rows of a quantised tensor: the ranges of their channels, and codes from numbers. The arithmetic is
// that of shared/quant_format.h, so all instruction sets give the same bits. codes.h goes the other way.
#pragma once

#include "cpu/isa/codes.h"
#include "cpu/isa/kernels.h"
#include "shared/quant_format.h"

namespace umfa::cpu {
namespace {

/// Widens each channel's range by a row: bits of the largest |x|; without `magnitude_only` also the
/// smallest and the largest number.
inline void quant_widen(const float* row, int64_t channels, bool magnitude_only,
                        uint32_t* magnitude, float* low, float* high) {
    for (int64_t c = 0; c < channels; ++c) {
        const uint32_t bits = UMFA_BITS_OF(row[c]) & 0x7fffffffu;
        magnitude[c] = bits > magnitude[c] ? bits : magnitude[c];
    }
    if (magnitude_only) return;
    for (int64_t c = 0; c < channels; ++c) {
        low[c] = row[c] < low[c] ? row[c] : low[c];
        high[c] = row[c] > high[c] ? row[c] : high[c];
    }
}

/// One code for each byte.
template <int CODES>
inline void codes_of_row(const float* x, int64_t channels, const ChannelScales& scales,
                         uint8_t* codes) {
    constexpr bool has_zero = CODES == UMFA_CODES_UINT8 || CODES == UMFA_CODES_UINT4;
    for (int64_t c = 0; c < channels; ++c)
        codes[c] =
            static_cast<uint8_t>(quant_code(CODES, x[c], {scales.scale[c], scales.inverse[c]},
                                            has_zero ? static_cast<int>(scales.offset[c]) : 0));
}

/// Writes a row's codes. `bytes`: room for one byte for each channel.
inline void quant_encode(int codes, const float* x, int64_t channels, const ChannelScales& scales,
                         uint8_t* bytes, uint8_t* to) {
    uint8_t* whole = bits_of_codes(codes) == 8 ? to : bytes;
    switch (codes) {
        case UMFA_CODES_INT8: codes_of_row<UMFA_CODES_INT8>(x, channels, scales, whole); break;
        case UMFA_CODES_UINT8: codes_of_row<UMFA_CODES_UINT8>(x, channels, scales, whole); break;
        case UMFA_CODES_INT4: codes_of_row<UMFA_CODES_INT4>(x, channels, scales, whole); break;
        case UMFA_CODES_UINT4: codes_of_row<UMFA_CODES_UINT4>(x, channels, scales, whole); break;
        case UMFA_CODES_E4M3: codes_of_row<UMFA_CODES_E4M3>(x, channels, scales, whole); break;
        case UMFA_CODES_E5M2: codes_of_row<UMFA_CODES_E5M2>(x, channels, scales, whole); break;
        case UMFA_CODES_E2M1: codes_of_row<UMFA_CODES_E2M1>(x, channels, scales, whole); break;
        default: codes_of_row<UMFA_CODES_NF4>(x, channels, scales, whole); break;
    }
    if (whole == to) return;
    for (int64_t i = 0; i < channels / 2; ++i)
        to[i] = static_cast<uint8_t>(bytes[2 * i] | bytes[2 * i + 1] << 4);
    if (channels % 2 != 0) to[channels / 2] = bytes[channels - 1];
}

template <class S>
constexpr QuantKernel quant_kernel{quant_widen, quant_encode, numbers_of_key<S>};

}  // namespace
}  // namespace umfa::cpu
