// Rows of quantised keys and values: where their codes and scales lie, and the numbers of a run of codes.
#pragma once

#include <metal_stdlib>

#include "shared/code_kinds.h"
#include "shared/constants.h"
#include "shared/operand.h"
#include "shared/params.h"
#include "shared/quant_format.h"
#include "shared/quant_parts.h"
#include "shared/sequence.h"

using namespace metal;

namespace umfa {

/// Scales or offsets of the codes of one head of a sequence. Strides in elements, from one block to the
/// next. They are read once: a loop with barriers would read them from memory in each round.
struct CodeBlocks {
    device const uchar* from;  // with pages: of all of them
    int64_t batch, row, channel;
};

/// What the codes of one head of a sequence need beside them.
struct Codes {
    CodeBlocks scales, offsets;
    int block_rows, block_channels;
    int first;  // row of the tensor that is the sequence's first; unused with pages
};

UMFA_INLINE int bytes_of_scale(int scales) {
    return scales == UMFA_SCALES_F32 ? 4 : scales == UMFA_SCALES_E8M0 ? 1 : 2;
}

UMFA_INLINE CodeBlocks code_blocks(device const uchar* from, int bytes,
                                   device const OperandStrides* strides,
                                   thread const SequenceParams& sequence, int head) {
    from += head * strides->head * bytes;
    if (!has_pages) from += sequence.kv_batch * strides->batch * bytes;
    const CodeBlocks blocks = {from, strides->batch, strides->row, strides->channel};
    return blocks;
}

/// `kind`: of the operand, a constant.
UMFA_INLINE Codes codes_of(device const uchar* scales, device const uchar* offsets,
                           device const CodesParams* params, CodeKind kind,
                           thread const SequenceParams& sequence, int head) {
    Codes codes = {};
    if (kind.scales != UMFA_SCALES_INLINE)
        codes.scales =
            code_blocks(scales, bytes_of_scale(kind.scales), &params->scales, sequence, head);
    if (kind.offset != UMFA_OFFSET_NONE)
        codes.offsets =
            code_blocks(offsets, kind.offset == UMFA_OFFSET_BIAS ? bytes_of_scale(kind.scales) : 1,
                        &params->offsets, sequence, head);
    codes.block_rows = params->block_rows;
    codes.block_channels = params->block_channels;
    codes.first = int(sequence.kv_row);
    return codes;
}

/// One row of codes, with the places of its first scale and offset, in elements.
struct CodeRow {
    device const uchar* bytes;
    int64_t scale, offset;
};

/// Elements from one block to the one that is `count` blocks behind it.
UMFA_INLINE int64_t blocks_apart(int count, int64_t stride, CodeKind kind) {
    if (kind.near) return count * int(stride);
    return count * stride;
}

/// Row `first` + `row` of a sequence, an existing one. `start`: row `first`; with pages, the start of
/// their memory.
UMFA_INLINE CodeRow code_row(device const uchar* start, constant OperandStrides& strides,
                             thread const Codes& codes, CodeKind kind, thread const Pages& pages,
                             int first, int row) {
    int64_t scale = 0, offset = 0;
    int in_blocks = codes.first + first + row;
    if (has_pages) {
        const PageRow<int> found = row_in_pages(pages.first + first + row, pages.size);
        const int64_t page = pages.table[found.page];
        start += page * strides.batch + rows_apart(found.row, strides);
        scale = page * codes.scales.batch;
        offset = page * codes.offsets.batch;
        in_blocks = found.row;
    } else {
        start += rows_apart(row, strides);
    }
    // Where one block spans the rows, its stride is 0.
    const int block = kind.row_blocks ? in_blocks / codes.block_rows : in_blocks;
    const CodeRow found = {start, scale + blocks_apart(block, codes.scales.row, kind),
                           offset + blocks_apart(block, codes.offsets.row, kind)};
    return found;
}

/// Where code_row() counts from.
UMFA_INLINE device const uchar* tile_of_codes(device const uchar* rows,
                                              constant OperandStrides& strides, int first) {
    return has_pages ? rows : rows + first * strides.row;
}

/// The block of a channel.
UMFA_INLINE int block_of(int column, thread const Codes& codes, CodeKind kind) {
    if (!kind.channel_blocks) return column;
    return kind.shift > 0 ? column >> kind.shift : column / codes.block_channels;
}

/// The scale of a channel.
UMFA_INLINE float scale_of(thread const CodeRow& row, thread const Codes& codes, CodeKind kind,
                           int column) {
    if (kind.scales == UMFA_SCALES_INLINE) {
        // In front of the codes of its block, at any address.
        device const uchar* at =
            row.bytes +
            column / UMFA_GGUF_BLOCK * quant_row_bytes(kind.codes, kind.scales, UMFA_GGUF_BLOCK);
        return quant_scale(kind.scales, uint(at[0]) | uint(at[1]) << 8);
    }
    const int block = block_of(column, codes, kind);
    const int64_t at = row.scale + blocks_apart(block, codes.scales.channel, kind);
    return quant_scale(kind.scales, stored_bits(codes.scales.from, kind.scales, at));
}

/// The zero point of a channel as a number, or its bias.
UMFA_INLINE float offset_of(thread const CodeRow& row, thread const Codes& codes, CodeKind kind,
                            int column) {
    if (kind.offset == UMFA_OFFSET_NONE) return 0.0f;
    const int block = block_of(column, codes, kind);
    const int64_t at = row.offset + blocks_apart(block, codes.offsets.channel, kind);
    return kind.offset == UMFA_OFFSET_BIAS
               ? quant_scale(kind.scales, stored_bits(codes.offsets.from, kind.scales, at))
               : float(codes.offsets.from[at]);
}

UMFA_INLINE uint mask_of_code(CodeKind kind) { return bits_of_codes(kind.codes) == 8 ? 255u : 15u; }

/// The number of a channel; zero past the last one, and where not `there`.
UMFA_INLINE float number_of(thread const CodeRow& row, thread const Codes& codes, CodeKind kind,
                            bool there, int column, int columns) {
    const int channel = existing<1>(column, columns);
    const QuantPlace<int> place = quant_place(kind.codes, kind.scales, channel);
    const uint code = uint(row.bytes[place.byte]) >> place.shift & mask_of_code(kind);
    const float x =
        dequantized(kind.offset, quant_number(kind.codes, code),
                    scale_of(row, codes, kind, channel), offset_of(row, codes, kind, channel));
    return there && is_channel(column, columns) ? x : 0.0f;
}

/// The codes of a run, 8 or 16 bytes, or of a part of one.
template <int WORDS>
UMFA_INLINE void load_run(thread uint* words, device const uchar* from) {
    if (WORDS == 4) {
        const uint4 v = *reinterpret_cast<device const uint4*>(from);
        words[0] = v.x;
        words[1] = v.y;
        words[2] = v.z;
        words[3] = v.w;
    } else if (WORDS == 2) {
        const uint2 v = *reinterpret_cast<device const uint2*>(from);
        words[0] = v.x;
        words[1] = v.y;
    } else {
        words[0] = *reinterpret_cast<device const uint*>(from);
    }
}

/// How a lane's channels of a row are cut into parts of a run, which it reads at once: see chunk_of() of
/// decode_rows.h.
constexpr int code_chunk(int per_lane) {
    return per_lane % 16 == 0 ? 16 : per_lane % 8 == 0 ? 8 : per_lane % 4 == 0 ? 4 : 2;
}

/// load_chunks() of decode_rows.h, of codes of BITS bits, as numbers of type T.
template <int BITS, typename T, int LANES, int PER_LANE, typename M>
UMFA_INLINE void load_code_chunks(thread M (&elements)[PER_LANE], device const uchar* rows,
                                  constant OperandStrides& strides, thread const Codes& codes,
                                  CodeKind kind, thread const Pages& pages, int k0, int row,
                                  int row_count, int lane, int columns) {
    constexpr int CHUNK = code_chunk(PER_LANE), BYTES = CHUNK * BITS / 8;
    const CodeRow at = code_row(tile_of_codes(rows, strides, k0), strides, codes, kind, pages, k0,
                                min(row, row_count - 1));
#pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE / CHUNK; ++i) {
        const int column = (i * LANES + lane) * CHUNK, from = existing<CHUNK>(column, columns);
        device const uchar* bytes = at.bytes + from * BITS / 8;
        uint words[BYTES < 4 ? 1 : BYTES / 4];
        if (BYTES == 1)
            words[0] = bytes[0];
        else if (BYTES == 2)
            words[0] = *reinterpret_cast<device const ushort*>(bytes);
        else
            load_run<BYTES / 4>(words, bytes);
        const float scale = scale_of(at, codes, kind, from),
                    offset = offset_of(at, codes, kind, from);
        const bool kept = is_channel(column, columns);
#pragma clang loop unroll(full)
        for (int e = 0; e < CHUNK; ++e) {
            const uint code = words[e * BITS / 32] >> e * BITS % 32 & mask_of_code(kind);
            const T x = T(dequantized(kind.offset, quant_number(kind.codes, code), scale, offset));
            elements[i * CHUNK + e] = kept ? M(x) : M(0);
        }
    }
}

}  // namespace umfa
