// Arguments of the kernels, laid out the same by Metal and by the host: only 4- and 8-byte fields,
// the 8-byte ones first, no bool, no 3-vectors.
#pragma once

#ifndef __METAL__
#include <stdint.h>
#endif

namespace umfa {

/// Strides of one operand in elements.
struct OperandStrides {
    int64_t batch, head, row, channel;
};

struct ForwardParams {
    OperandStrides query, key, value, out;
    OperandStrides lse;  // row: stride between queries; channel unused
    int64_t mask_batch, mask_head, mask_row, mask_column;  // 0 where the mask broadcasts
    int64_t slopes_batch, slopes_head;
    int32_t seqlen_q, seqlen_kv;
    int32_t head_dim, head_dim_v;  // what the tensors have; the kernel's D may be larger
    int32_t group;                 // query heads per key head
    int32_t offset, left, right;   // Visible<int>
    float score_scale;             // log2(e) is in it, unless softcap is on
    float softcap;                 // softcap * log2(e)
};

}  // namespace umfa
