// Keys and values of a tile from the codes of a quantised format. The arithmetic is that of
// shared/quant_format.h, so attention sees the numbers that dequantising gives.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/rows.h"
#include "shared/quant_format.h"

namespace umfa::cpu {
namespace {

/// Channels of a tile's row that have to be written out as floats.
inline int64_t number_channels(const ForwardArgs& args) {
    return (args.key_codes.given ? args.head_dim : 0) +
           (args.value_codes.given ? args.head_dim_v : 0);
}

/// Bits of element `at` of scales or biases, or a byte.
inline uint32_t stored_bits(const char* at, int scale_kind) {
    uint32_t word = 0;
    if (scale_kind == UMFA_SCALES_F32)
        __builtin_memcpy(&word, at, 4);
    else
        __builtin_memcpy(&word, at, scale_kind == UMFA_SCALES_E8M0 ? 1 : 2);
    return word;  // little-endian, as all machines that umfa runs on
}

constexpr int64_t half_bytes = 64;  // codes of 4 bits that are taken apart together

/// The numbers of at most half_bytes codes, two in a byte. Compilers turn each loop into vectors.
template <int CODES>
inline void numbers_of_halves(const uint8_t* from, int64_t count, float* to) {
    uint8_t codes[half_bytes];
    const int64_t bytes = (count + 1) / 2;
    for (int64_t i = 0; i < bytes; ++i) {
        codes[2 * i] = from[i] & 15;
        codes[2 * i + 1] = from[i] >> 4;
    }
    if constexpr (CODES == UMFA_CODES_NF4 || CODES == UMFA_CODES_E2M1) {
        float numbers[16];
        for (uint32_t code = 0; code < 16; ++code) numbers[code] = quant_number(CODES, code);
        for (int64_t i = 0; i < count; ++i) to[i] = numbers[codes[i]];
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = quant_number(CODES, codes[i]);
    }
}

/// What the codes of channels [first, end) of a row stand for. CODES, INSIDE: as quant_place() takes
/// them.
template <int CODES, int INSIDE>
inline void numbers_of_codes(const uint8_t* row, int64_t first, int64_t end, float* to) {
    const QuantPlace<int64_t> place = quant_place(CODES, INSIDE, first);
    const uint8_t* from = row + place.byte;
    if constexpr (CODES == UMFA_CODES_INT8 || CODES == UMFA_CODES_UINT8 ||
                  CODES == UMFA_CODES_E4M3 || CODES == UMFA_CODES_E5M2) {
        for (int64_t c = first; c < end; ++c) to[c] = quant_number(CODES, from[c - first]);
    } else if constexpr (CODES == UMFA_CODES_Q4_0) {  // one block
        for (int64_t i = 0; i < UMFA_GGUF_BLOCK / 2; ++i) {
            to[first + i] = quant_number(CODES, from[i] & 15u);
            to[first + i + UMFA_GGUF_BLOCK / 2] = quant_number(CODES, from[i] >> 4);
        }
    } else {
        int64_t c = first;
        if (place.shift != 0) to[c++] = quant_number(CODES, *from++ >> 4);
        for (; c < end; c += half_bytes, from += half_bytes / 2)
            numbers_of_halves<CODES>(from, end - c < half_bytes ? end - c : half_bytes, to + c);
    }
}

/// Channels [first, end) of a row, which share `scale` and `offset`.
template <int CODES, int INSIDE>
inline void numbers_of_block(const uint8_t* row, int64_t first, int64_t end, float scale,
                             float offset, int offset_kind, float* to) {
    numbers_of_codes<CODES, INSIDE>(row, first, end, to);
    if (offset_kind == UMFA_OFFSET_BIAS)
        for (int64_t c = first; c < end; ++c)
            to[c] = dequantized(UMFA_OFFSET_BIAS, to[c], scale, offset);
    else
        for (int64_t c = first; c < end; ++c)
            to[c] = dequantized(UMFA_OFFSET_ZERO, to[c], scale, offset);
}

/// One row as floats. `row`: its codes.
template <int CODES, int INSIDE>
inline void numbers_of_row(const Codes& codes, const uint8_t* row, KeyPlace place, int64_t head,
                           int64_t channels, float* to) {
    const int64_t block = place.row / codes.block_rows;
    const auto offset_to = [&](const Codes::Strides& strides) {
        return place.batch * strides.batch + head * strides.head + block * strides.row;
    };
    const char* scales = codes.scales + (codes.scales ? offset_to(codes.scale_strides) : 0);
    const char* offsets = codes.offsets + (codes.offsets ? offset_to(codes.offset_strides) : 0);
    for (int64_t first = 0; first < channels; first += codes.block_channels) {
        const int64_t next = first + codes.block_channels;
        const char* stored = scales;
        if (INSIDE == UMFA_SCALES_INLINE)  // in front of the codes
            stored =
                reinterpret_cast<const char*>(row) + quant_place(CODES, INSIDE, first).byte - 2;
        const float scale = quant_scale(codes.scale_kind, stored_bits(stored, codes.scale_kind));
        float offset = 0;
        if (codes.offset_kind == UMFA_OFFSET_BIAS)
            offset = quant_scale(codes.scale_kind, stored_bits(offsets, codes.scale_kind));
        else if (codes.offset_kind == UMFA_OFFSET_ZERO)
            offset = static_cast<float>(static_cast<uint8_t>(*offsets));
        numbers_of_block<CODES, INSIDE>(row, first, next < channels ? next : channels, scale,
                                        offset, codes.offset_kind, to);
        scales += codes.scale_strides.channel;
        offsets += codes.offset_strides.channel;
    }
}

using RowNumbers = void (*)(const Codes&, const uint8_t*, KeyPlace, int64_t, int64_t, float*);

inline RowNumbers row_numbers(const Codes& codes) {
    const bool inside = codes.scale_kind == UMFA_SCALES_INLINE;
    switch (codes.codes) {
        case UMFA_CODES_INT8:
            return inside ? numbers_of_row<UMFA_CODES_INT8, UMFA_SCALES_INLINE>
                          : numbers_of_row<UMFA_CODES_INT8, UMFA_SCALES_F32>;
        case UMFA_CODES_UINT8: return numbers_of_row<UMFA_CODES_UINT8, UMFA_SCALES_F32>;
        case UMFA_CODES_INT4: return numbers_of_row<UMFA_CODES_INT4, UMFA_SCALES_F32>;
        case UMFA_CODES_UINT4: return numbers_of_row<UMFA_CODES_UINT4, UMFA_SCALES_F32>;
        case UMFA_CODES_E4M3: return numbers_of_row<UMFA_CODES_E4M3, UMFA_SCALES_F32>;
        case UMFA_CODES_E5M2: return numbers_of_row<UMFA_CODES_E5M2, UMFA_SCALES_F32>;
        case UMFA_CODES_E2M1: return numbers_of_row<UMFA_CODES_E2M1, UMFA_SCALES_F32>;
        case UMFA_CODES_NF4: return numbers_of_row<UMFA_CODES_NF4, UMFA_SCALES_F32>;
        default: return numbers_of_row<UMFA_CODES_Q4_0, UMFA_SCALES_INLINE>;
    }
}

/// The same for the backend.
inline void numbers_of_key(const Codes& codes, const void* row, int64_t batch, int64_t head,
                           int64_t at, int64_t channels, float* to) {
    row_numbers(codes)(codes, static_cast<const uint8_t*>(row), {batch, at}, head, channels, to);
}

/// Writes the numbers of keys [first, first + count) to `memory`, and points `rows` at them.
template <class Row>
inline void numbers_of_keys(const ForwardArgs& args, const Codes& codes, const Sequence& sequence,
                            int64_t head, int64_t first, int64_t count, int64_t channels,
                            float* memory, Row* rows) {
    const RowNumbers numbers = row_numbers(codes);
    for (int64_t k = 0; k < count; ++k, memory += channels) {
        const void* row = rows[k];
        numbers(codes, static_cast<const uint8_t*>(row),
                key_place(sequence, args.page_size, first + k), head, channels, memory);
        rows[k] = reinterpret_cast<Row>(memory);
    }
}

/// The same of keys and values, as far as they are quantised. The rows then hold float32, and follow
/// the types and channel strides in args.
template <class Row>
inline void numbers_of_keys(const ForwardArgs& args, const Sequence& sequence, int64_t head,
                            int64_t first, int64_t count, float* memory, Row* keys, Row* values) {
    if (args.key_codes.given) {
        numbers_of_keys(args, args.key_codes, sequence, head, first, count, args.head_dim, memory,
                        keys);
        memory += count * args.head_dim;
    }
    if (args.value_codes.given)
        numbers_of_keys(args, args.value_codes, sequence, head, first, count, args.head_dim_v,
                        memory, values);
}

}  // namespace
}  // namespace umfa::cpu
