// Where the rows of a sequence are: by themselves at one index of the batch, or anywhere in the
// tensors, the keys perhaps in pages.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/kinds.h"
#include "shared/pages.h"
#include "shared/params.h"
#include "shared/visible.h"

using namespace metal;

namespace umfa {

/// Place of a slice's threadgroup in the grid of all slices.
inline uint3 place_in_grid(uint3 group, constant ForwardParams& params) {
    return is_slice ? group + uint3(params.origin.x, params.origin.y, params.origin.z) : group;
}

inline SequenceParams sequence_at(constant ForwardParams& params,
                                  device const SequenceParams* sequences, int index) {
    if (has_sequences) {
        const SequenceParams found = sequences[index];
        return found;
    }
    SequenceParams found = {};
    found.query_batch = found.kv_batch = index;
    found.seqlen_q = params.seqlen_q;
    found.visibility.seqlen_kv = params.visibility.seqlen_kv;
    found.visibility.offset = params.visibility.offset;
    found.position_q = params.visibility.offset;
    return found;
}

/// What the sequence's queries see. What is the same for the whole call comes from `params`, which
/// may be read again where a register would have to keep it (decode with pages: half the speed
/// otherwise, H200).
inline Visible<int> visible_of(constant ForwardParams& params,
                               thread const SequenceParams& sequence) {
    const Visible<int> found = {sequence.visibility.seqlen_kv,
                                sequence.visibility.offset,
                                params.visibility.left,
                                params.visibility.right,
                                has_chunk ? params.visibility.chunk : 0,
                                params.visibility.chunk_offset,
                                has_prefix ? sequence.visibility.prefix : 0};
    return found;
}

/// Row `at` of a sequence in pages. `size`: as params have it.
inline PageRow<int> row_in_pages(int at, int size) {
    if (shifts_pages) return page_row_by_shift(at, size);
    return page_row(at, size);
}

/// Pages of one sequence.
struct Pages {
    device const int* table;
    int size;   // of a page; with shifts_pages, its log2
    int first;  // row of the pages that is row 0 of the sequence
};

inline Pages pages_of(constant ForwardParams& params, device const int* table,
                      thread const SequenceParams& sequence) {
    Pages pages;
    pages.table = has_pages ? table + sequence.pages : nullptr;
    pages.size = params.pages;
    pages.first = has_pages ? int(sequence.kv_row) : 0;
    return pages;
}

/// First row of a sequence's keys or values; with pages, of all pages.
template <typename T>
inline device const uchar* first_key(device const uchar* rows, int kind,
                                     constant OperandStrides& strides,
                                     thread const SequenceParams& sequence, int head) {
    rows = moved<T>(rows, kind, head * strides.head);
    if (!has_pages) rows = moved<T>(rows, kind, sequence.kv_batch * strides.batch);
    if (has_sequences && !has_pages) rows = moved<T>(rows, kind, sequence.kv_row * strides.row);
    return rows;
}

/// Whether a kernel carries pointers to the rows of K and V from tile to tile, which saves a product
/// of 64 bits for each. Pages have no next row, and behind a prefix tiles are left out. Rows of codes
/// are not carried either.
inline bool carries_rows() { return !has_pages && !has_prefix; }

/// `rows` of K or V moved by `count` rows, if they are carried.
template <typename T>
inline device const T* carried(device const T* rows, constant OperandStrides& strides,
                               int64_t count) {
    return carries_rows() ? rows + count * strides.row : rows;
}
template <typename T>
inline device const uchar* carried(device const uchar* rows, int kind,
                                   constant OperandStrides& strides, int64_t count) {
    return carries_rows() && kind != UMFA_KIND_CODES ? moved<T>(rows, kind, count * strides.row)
                                                     : rows;
}

/// The rows of the tile at `k0`; with pages, the start of their memory.
template <typename T>
inline device const T* tile_rows(device const T* rows, constant OperandStrides& strides, int k0) {
    return has_pages || carries_rows() ? rows : rows + k0 * strides.row;
}

/// Elements from one row of a tile or a page to the row that is `count` rows behind it.
inline int64_t rows_apart(int count, constant OperandStrides& strides) {
    if (near_rows) return count * int(strides.row);
    return count * strides.row;
}

/// Start of an existing row; `rows` is row 0, or with pages the start of the page memory. Decoding
/// from pages of 16 keys takes 1.38 times as long as without pages if it divides, 1.06 if it shifts
/// (H200).
template <typename T>
inline device const T* key_row(device const T* rows, constant OperandStrides& strides,
                               thread const Pages& pages, int row) {
    if (!has_pages) return rows + rows_apart(row, strides);
    const PageRow<int> at = row_in_pages(pages.first + row, pages.size);
    const int64_t page = near_rows ? int64_t(int(strides.batch)) : strides.batch;
    return rows + pages.table[at.page] * page + rows_apart(at.row, strides);
}

}  // namespace umfa
