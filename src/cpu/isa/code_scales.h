// Scales and offsets of quantised rows as floats. The arithmetic is that of shared/quant_format.h.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/rows.h"
#include "shared/quant_format.h"

namespace umfa::cpu {
namespace {

/// `count` stored scales, `stride` bytes apart, as words of 32 bits that lie `pitch` words apart.
/// Little-endian, as all machines that umfa runs on.
template <class Stored>
inline void copy_bits(const char* from, int64_t stride, int64_t count, float* to, int64_t pitch) {
    for (int64_t i = 0; i < count; ++i, from += stride) {
        Stored stored;
        __builtin_memcpy(&stored, from, sizeof stored);
        const uint32_t word = stored;
        __builtin_memcpy(to + i * pitch, &word, sizeof word);
    }
}

/// The same of scales of a kind. E8M0 also stands for zero points: both are bytes.
inline void copy_bits(int kind, const char* from, int64_t stride, int64_t count, float* to,
                      int64_t pitch) {
    if (kind == UMFA_SCALES_F32) return copy_bits<uint32_t>(from, stride, count, to, pitch);
    if (kind == UMFA_SCALES_E8M0) return copy_bits<uint8_t>(from, stride, count, to, pitch);
    copy_bits<uint16_t>(from, stride, count, to, pitch);
}

/// In place; `Convert` makes a float of the bits.
template <float (*Convert)(uint32_t)>
inline void convert_bits(float* memory, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, memory + i, sizeof word);
        memory[i] = Convert(word);
    }
}

template <int Kind>
inline float scale_of_bits(uint32_t bits) {
    return quant_scale(Kind, bits);
}
inline float zero_of_bits(uint32_t bits) { return static_cast<float>(static_cast<int>(bits)); }

/// Stored bits -> floats, in place. A loop for each kind, so that compilers make vectors of it.
inline void scales_of_bits(int kind, float* memory, int64_t count) {
    switch (kind) {
        case UMFA_SCALES_F32: return convert_bits<scale_of_bits<UMFA_SCALES_F32>>(memory, count);
        case UMFA_SCALES_BF16: return convert_bits<scale_of_bits<UMFA_SCALES_BF16>>(memory, count);
        case UMFA_SCALES_E8M0: return convert_bits<scale_of_bits<UMFA_SCALES_E8M0>>(memory, count);
        default: return convert_bits<scale_of_bits<UMFA_SCALES_F16>>(memory, count);
    }
}

/// Where the scales of a row are. Equal places have equal scales.
struct ScalePlace {
    int64_t batch, block;
    bool operator==(const ScalePlace& other) const {
        return batch == other.batch && block == other.block;
    }
};

inline ScalePlace scale_place(const Codes& codes, KeyPlace place) {
    return {place.batch, codes.block_rows == 1 ? place.row : place.row / codes.block_rows};
}

/// The scales of up to `pitch` rows of one head, and behind them, `room` floats on, their offsets: of
/// block b of row k at [b * pitch + k]. add() copies bits, and finish() makes floats of them.
struct Scales {
    const Codes& codes;
    int64_t first_block, blocks;  // of a row
    float* memory;
    int64_t pitch, room;

    /// Of row k; `row`: its codes.
    void add(int64_t k, ScalePlace place, int64_t head, const uint8_t* row) const {
        if (codes.scales) {
            copy_bits(codes.scale_kind, scales_at(place, head), codes.scale_strides.channel, blocks,
                      memory + k, pitch);
        } else {  // in front of the codes of each block
            const int64_t size =
                quant_row_bytes<int64_t>(codes.codes, UMFA_SCALES_INLINE, UMFA_GGUF_BLOCK);
            copy_bits(codes.scale_kind, reinterpret_cast<const char*>(row) + first_block * size,
                      size, blocks, memory + k, pitch);
        }
        if (codes.offsets)
            copy_bits(offset_kind(), offsets_at(place, head), codes.offset_strides.channel, blocks,
                      memory + room + k, pitch);
    }
    /// Of `rows` rows that follow each other and share no scale; those of the next rows are prefetched.
    void add_rows(int64_t rows, ScalePlace first, int64_t head) const {
        const char* next = scales_at(first, head) + rows * codes.scale_strides.row;
        for (int64_t k = 0; k < rows; ++k)
            __builtin_prefetch(next + k * codes.scale_strides.row, 0, 3);
        for (int64_t b = 0; b < blocks; ++b) {
            copy_bits(codes.scale_kind, scales_at(first, head) + b * codes.scale_strides.channel,
                      codes.scale_strides.row, rows, memory + b * pitch, 1);
            if (codes.offsets)
                copy_bits(offset_kind(), offsets_at(first, head) + b * codes.offset_strides.channel,
                          codes.offset_strides.row, rows, memory + room + b * pitch, 1);
        }
    }
    void finish(int64_t rows) const {
        if (rows == pitch) return convert(memory, blocks * rows);
        for (int64_t b = 0; b < blocks; ++b) convert(memory + b * pitch, rows);
    }
    /// Where all rows have the scales of the first.
    void finish_same(int64_t rows) const {
        for (int64_t b = 0; b < blocks; ++b) {
            float* own = memory + b * pitch;
            convert(own, 1);
            for (int64_t k = 1; k < rows; ++k) own[k] = own[0];
            if (codes.offsets)
                for (int64_t k = 1; k < rows; ++k) own[room + k] = own[room];
        }
    }

private:
    void convert(float* own, int64_t count) const {
        scales_of_bits(codes.scale_kind, own, count);
        if (codes.offset_kind == UMFA_OFFSET_BIAS)
            scales_of_bits(codes.scale_kind, own + room, count);
        else if (codes.offset_kind == UMFA_OFFSET_ZERO)
            convert_bits<zero_of_bits>(own + room, count);
    }
    int offset_kind() const {
        return codes.offset_kind == UMFA_OFFSET_BIAS ? codes.scale_kind : UMFA_SCALES_E8M0;
    }
    const char* scales_at(ScalePlace place, int64_t head) const {
        return codes.scales + offset_in(codes.scale_strides, place, head);
    }
    const char* offsets_at(ScalePlace place, int64_t head) const {
        return codes.offsets + offset_in(codes.offset_strides, place, head);
    }
    int64_t offset_in(const Codes::Strides& strides, ScalePlace place, int64_t head) const {
        return place.batch * strides.batch + head * strides.head + place.block * strides.row +
               first_block * strides.channel;
    }
};

}  // namespace
}  // namespace umfa::cpu
