// One row of a quantised tensor: from numbers to codes and back. The arithmetic is that of
// shared/quant_format.h.
#pragma once

#include <cstdint>

#include "core/quant_operand.h"

namespace umfa::cpu {

/// What each channel of some rows needs: pointers to one value for each channel.
struct ChannelScales {
    float *scale, *inverse;  // inverse: to encode
    float* offset;           // zero points as numbers, or biases
};

/// Writes the codes of `channels` numbers.
void encode_row(const QuantFormat& format, const float* x, int64_t channels,
                const ChannelScales& scales, uint8_t* to);

/// The numbers of a row of codes.
void decode_row(const QuantFormat& format, const uint8_t* from, int64_t channels,
                const ChannelScales& scales, float* x);

/// Overwrites the code of one channel.
void set_code(const QuantFormat& format, uint8_t* row, int64_t channel, uint32_t code);

}  // namespace umfa::cpu
