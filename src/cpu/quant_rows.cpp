#include "cpu/quant_rows.h"

#include <type_traits>

#include "shared/quant_format.h"

namespace umfa::cpu {
namespace {

template <int CODES>
uint32_t code_of(const float* x, const ChannelScales& scales, int64_t c) {
    constexpr bool has_zero = CODES == UMFA_CODES_UINT8 || CODES == UMFA_CODES_UINT4;
    return quant_code(CODES, x[c], {scales.scale[c], scales.inverse[c]},
                      has_zero ? static_cast<int>(scales.offset[c]) : 0);
}

template <int CODES>
void encode(const float* x, int64_t channels, const ChannelScales& scales, uint8_t* to) {
    if (bits_of_codes(CODES) == 8) {
        for (int64_t c = 0; c < channels; ++c)
            to[c] = static_cast<uint8_t>(code_of<CODES>(x, scales, c));
        return;
    }
    for (int64_t c = 0; c + 1 < channels; c += 2)
        to[c / 2] = static_cast<uint8_t>(code_of<CODES>(x, scales, c) |
                                         code_of<CODES>(x, scales, c + 1) << 4);
    if (channels % 2 != 0)
        to[channels / 2] = static_cast<uint8_t>(code_of<CODES>(x, scales, channels - 1));
}

template <int CODES>
void decode(int inside, const uint8_t* from, int64_t channels, float* x) {
    for (int64_t c = 0; c < channels; ++c) {
        const QuantPlace<int64_t> place = quant_place(CODES, inside, c);
        const uint32_t mask = (1u << bits_of_codes(CODES)) - 1;
        x[c] = quant_number(CODES, from[place.byte] >> place.shift & mask);
    }
}

/// Calls `f` with the codes as a constant.
template <class F>
void with_codes(int codes, const F& f) {
    switch (codes) {
#define UMFA_CASE(name) \
    case name: return f(std::integral_constant<int, name>{});
        UMFA_CASE(UMFA_CODES_INT8)
        UMFA_CASE(UMFA_CODES_UINT8)
        UMFA_CASE(UMFA_CODES_INT4)
        UMFA_CASE(UMFA_CODES_UINT4)
        UMFA_CASE(UMFA_CODES_E4M3)
        UMFA_CASE(UMFA_CODES_E5M2)
        UMFA_CASE(UMFA_CODES_E2M1)
        UMFA_CASE(UMFA_CODES_NF4)
        UMFA_CASE(UMFA_CODES_Q4_0)
#undef UMFA_CASE
        default: break;
    }
}

}  // namespace

void encode_row(const QuantFormat& format, const float* x, int64_t channels,
                const ChannelScales& scales, uint8_t* to) {
    with_codes(format.codes(), [&](auto codes) { encode<codes>(x, channels, scales, to); });
}

void decode_row(const QuantFormat& format, const uint8_t* from, int64_t channels,
                const ChannelScales& scales, float* x) {
    with_codes(format.codes(), [&](auto codes) {
        if (format.scales == QuantScales::inside)
            decode<codes>(UMFA_SCALES_INLINE, from, channels, x);
        else
            decode<codes>(UMFA_SCALES_F32, from, channels, x);
    });
    if (format.offset == QuantOffset::bias)
        for (int64_t c = 0; c < channels; ++c)
            x[c] = dequantized(UMFA_OFFSET_BIAS, x[c], scales.scale[c], scales.offset[c]);
    else
        for (int64_t c = 0; c < channels; ++c)
            x[c] = dequantized(UMFA_OFFSET_ZERO, x[c], scales.scale[c], scales.offset[c]);
}

void set_code(const QuantFormat& format, uint8_t* row, int64_t channel, uint32_t code) {
    const QuantPlace<int64_t> place = quant_place(format.codes(), format.scale_kind(), channel);
    const uint32_t mask = ((1u << bits_of_codes(format.codes())) - 1) << place.shift;
    row[place.byte] = static_cast<uint8_t>((row[place.byte] & ~mask) | code << place.shift);
}

}  // namespace umfa::cpu
