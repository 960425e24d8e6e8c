// How a kernel reads an operand of codes. The planner packs it into one function constant, so that a
// kernel is compiled for the format and the branches on it cost nothing.
#pragma once

#include "shared/quant_format.h"

namespace umfa {

/// Channels whose codes a lane reads at once: 16 bytes, or 8 of 4-bit codes. Blocks of several channels
/// consist of such runs.
#define UMFA_CODE_RUN 16

struct CodeKind {
    int codes, scales, offset;  // UMFA_CODES_, UMFA_SCALES_ and UMFA_OFFSET_ of quant_format.h
    bool wide;                  // runs of UMFA_CODE_RUN channels are aligned to their bytes
    bool row_blocks;            // several rows share a scale, and not all of them
    bool channel_blocks;        // several channels share a scale, and not all of them
    bool each;                  // every channel has a scale of its own
    bool near;                  // 31 bits hold the distance of two scales of a head, or of a page
    int shift;                  // log2 of the channels that share a scale; 0: some other number
};

/// Never 0, which stands for an operand of numbers.
UMFA_INLINE int packed_kind(CodeKind kind) {
    return 1 | kind.codes << 1 | kind.scales << 5 | kind.offset << 8 | (kind.wide ? 1 << 10 : 0) |
           (kind.row_blocks ? 1 << 11 : 0) | (kind.channel_blocks ? 1 << 12 : 0) |
           (kind.each ? 1 << 13 : 0) | (kind.near ? 1 << 14 : 0) | kind.shift << 15;
}

UMFA_INLINE CodeKind unpacked_kind(int packed) {
    const CodeKind kind = {
        packed >> 1 & 15,        packed >> 5 & 7,         packed >> 8 & 3,
        (packed >> 10 & 1) != 0, (packed >> 11 & 1) != 0, (packed >> 12 & 1) != 0,
        (packed >> 13 & 1) != 0, (packed >> 14 & 1) != 0, packed >> 15 & 15};
    return kind;
}

}  // namespace umfa
