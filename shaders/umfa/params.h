// Parameter structs of the kernels, laid out the same by Metal and by the host: only 4- and 8-byte fields,
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

/// Split-KV decode: the keys that any query sees, [first_key, last_key), in `splits` equal pieces.
struct DecodeParams {
    ForwardParams forward;
    int32_t first_key, last_key;
    int32_t keys_per_split, splits;
    int32_t heads;  // of the query
    int32_t reserved;
};

/// Merge of what the splits found. Rows are (batch, query head, query), as the partial results lie.
struct MergeParams {
    OperandStrides out, lse;
    int32_t heads, seqlen_q, head_dim_v;
    int32_t splits;
};

}  // namespace umfa
