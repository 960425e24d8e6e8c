// Parameter structs of the kernels, laid out the same by Metal and by the host: only 4- and 8-byte fields,
// the 8-byte ones first, no bool, no 3-vectors.
#pragma once

#ifndef __METAL_VERSION__  // defined by every Metal compiler; __METAL__ from Metal 3 on
#include <stdint.h>
#endif

#include "shared/indices.h"
#include "shared/visible.h"

namespace umfa {

/// Strides of one operand in elements.
struct OperandStrides {
    int64_t batch, head, row, channel;
};

/// Strides of the tables of cosines and sines in elements.
struct RotaryParams {
    int64_t cos_position, cos_channel, sin_position, sin_channel;
    int32_t channels;  // that are rotated
    int32_t advance;   // positions from one query to the next: 1, or 0 where all stand as the first
};

/// Of shared/philox.h.
struct DropoutParams {
    uint32_t key_low, key_high;
    uint32_t threshold;
    uint32_t batch_first, batch_step;  // of the batch's indices, as philox.h counts them
    float factor;                      // 1 / (1 - p)
};

/// Where a slice of a launch begins in the grid of all its slices, in threadgroups.
struct GridOrigin {
    uint32_t x, y, z, reserved;
};

struct ForwardParams {
    OperandStrides query, key, value, out;
    OperandStrides lse;  // row: stride between queries; channel unused
    int64_t mask_batch, mask_head, mask_row, mask_column;  // 0 where the mask broadcasts
    int64_t slopes_batch, slopes_head;
    int64_t sink;  // stride between heads
    OperandStrides qv;
    RotaryParams rotary;
    DropoutParams dropout;
    GridOrigin origin;
    int32_t seqlen_q;              // of the longest sequence
    int32_t pages;                 // rows of a page of keys; with shifts_pages, their log2
    int32_t head_dim, head_dim_v;  // what the tensors have; the kernel's D may be larger
    int32_t group;                 // query heads per key head
    float score_scale;             // log2(e) is in it, unless softcap is on
    float softcap;                 // softcap * log2(e)
    float mask_unit;               // of a mask that is added, in units of scores
    Visible<int32_t> visibility;   // where there are no sequences
};

/// Where one sequence of the batch lies, in rows of the tensors.
struct SequenceParams {
    int64_t query_batch, query_row;  // its first query
    int64_t kv_batch, kv_row;        // its first key; with pages kv_row is a row of all of them
    int64_t pages;                   // its first page in the table
    int64_t part;                    // split-KV: the first of its partial results
    int32_t seqlen_q;
    int32_t splits;      // split-KV
    int32_t position_q;  // of its first query and new key, for rotary angles
    Visible<int32_t> visibility;
};

/// What one threadgroup does, for each head: sequences differ in length, and a grid over the longest
/// would be mostly empty.
struct SequenceTask {
    int32_t sequence, first_row, split;  // with has_device_tables, a sequence of -1: nothing
    int32_t keys;                        // of a split, with has_device_tables
};

/// Some new rows of one sequence, for each key head.
struct AppendTask {
    int64_t new_batch, new_row;   // the first of them, in new_key and new_value
    int32_t sequence, first_key;  // which key of the sequence it becomes
    int32_t rows, position;       // position of the first, for rotary angles
};

// How the numbers of a table are stored.
#define UMFA_TABLE_NONE 0  // there is no such table
#define UMFA_TABLE_I32 1
#define UMFA_TABLE_I64 2

/// Of a table that a kernel reads, in elements.
struct TableLayout {
    int64_t row, column;  // strides
    int32_t kind, reserved;
};

/// A number that was out of range. `table`: 1 + its index, or one of these; 0: nothing was.
#define UMFA_FAULT_LENGTH (UMFA_SEQUENCES_TABLES + 1)    // a sequence of keys above max_seqlen_k
#define UMFA_FAULT_POSITION (UMFA_SEQUENCES_TABLES + 2)  // behind the last rotary angle
#define UMFA_FAULT_SHARED (UMFA_SEQUENCES_TABLES + 3)    // `row` would write rows that `got` writes
struct TableFault {
    int64_t got, low, high;
    int32_t table, row, column, reserved;
};
#define UMFA_FAULT_WORDS 5  // of 64 bits

/// Where sequences lie, from tables on the GPU, and which threadgroups the next kernel has.
struct SequencesParams {
    TableLayout tables[UMFA_SEQUENCES_TABLES];
    int64_t query_rows, key_rows;     // of a dense query and key, or of the packed; of all pages
    int64_t kv_batch, table_rows;     // how many indices key, and the block table, have
    int64_t most_q, most_kv;          // max_seqlen_q and max_seqlen_k
    int64_t last_position;            // of a first query and new key, for rotary angles
    int32_t batch, page_size, pages;  // pages: of a sequence
    int32_t top_left;
    Visible<int32_t> visibility;  // what all sequences have in common
    int32_t group;                // rows of a query
    int32_t block;                // rows of a threadgroup
    int32_t alignment;            // of the first key that is split
    int32_t round;                // keys that a split has a multiple of
    int32_t splits;               // 1: keys are not split; else the caller's, or 0
    int32_t least_keys;           // worth a split of their own
    int32_t threadgroups;         // that fill the GPU
    int32_t heads, heads_kv;
    int32_t new_rows;               // of each sequence
    int32_t append_block;           // rows of a threadgroup that appends
    int32_t new_pieces;             // pages, or 1, that a sequence's new rows reach into, at most
    int32_t check_shared;           // not 0: sequences may have places in common
    int32_t task_count, row_count;  // of the lists; what is left of them is filled with nothing
};

/// Rows of the results that belong to no sequence: no key, so 0 and a log-sum-exp of -inf.
struct UnusedRows {
    int64_t batch, row;
    int32_t rows, reserved;
};

/// Rows that a threadgroup clears: enough to be worth one, few enough that long gaps go to many.
#define UMFA_CLEARED_ROWS 16

struct ClearParams {
    OperandStrides out, lse;
    int32_t head_dim_v;
    int32_t rows;  // with has_device_tables: all of an index of the batch are cleared
};

/// New rows of keys and values.
struct AppendParams {
    OperandStrides key, value, new_key, new_value;
    RotaryParams rotary;
    int32_t pages;  // as in ForwardParams
    int32_t head_dim, head_dim_v;
    int32_t reserved;
};

/// Strides of partial results, or of their merge, in elements.
struct PartStrides {
    int64_t part, batch, row, head, channel;
};

/// Merge of the results of parts of the keys. Rows are (row, head), counted together.
struct CombineParams {
    PartStrides out_partial, lse_partial, out, lse;
    int32_t parts, rows, heads, head_dim;
};

/// Split-KV decode: the keys that any query sees, [first_key, last_key), in `splits` equal pieces.
struct DecodeParams {
    ForwardParams forward;
    int32_t first_key, last_key;
    int32_t keys_per_split, splits;
    int32_t heads;  // of the query
    int32_t reserved;
};

/// Of the forward kernel where rows pack heads: the keys that any query sees, from a whole tile on, in
/// `splits` equal pieces.
struct SplitParams {
    int32_t keys_per_split, splits;
    int32_t heads;  // of the query
    int32_t reserved;
};

/// P is raised by 2 to this power where it is multiplied in half, whose smallest numbers are too large for
/// it (gradients.h).
#define UMFA_HALF_RAISED 12

/// Gradients. `forward`: the call, with the strides of its out and lse.
struct BackwardParams {
    ForwardParams forward;
    OperandStrides dout, dlse, dq, dk, dv, dqv;
    OperandStrides statistics;  // of the rows of queries; channel unused
    float score_factor;         // on dQ, dK and dQV
    float value_factor;         // on dV
    float qv_factor;            // with qv, on dS in dV, beside value_factor
    float raised;               // P is 2^raised times as large (gradients.h)
    int32_t rows;               // of an index of the batch in the tensors of queries
    int32_t reserved;
};

/// Gradient of a mask. Each threadgroup has some rows and columns of it.
struct MaskGradientParams {
    BackwardParams backward;
    int64_t batch, head, row, column;  // strides of the gradient
    float factor;
    int32_t batches, heads;         // that share an element
    int32_t rows, columns;          // of the gradient
    int32_t tiles;                  // of its columns
    int32_t all_rows, all_columns;  // not 0: one row is for all queries, one column for all keys
};

/// Sums over all rows of some sequences and heads.
struct RowSumsParams {
    OperandStrides rows;  // channel unused
    int64_t sum_batch, sum_head;
    int64_t sink;          // stride between heads
    float factor;          // on each sum
    int32_t batch, heads;  // of one sum
    int32_t seqlen_q;
};

/// Merge of what the splits found. Rows are (batch, query head, query), as the partial results lie.
struct MergeParams {
    OperandStrides out, lse;
    int64_t sink;  // stride between heads
    int32_t heads, seqlen_q, head_dim_v;
    int32_t splits;
    float dropout_factor;
    int32_t reserved;
};

/// Of a quantised tensor: what shares a scale. Blocks at the ends may be smaller.
struct QuantBlocks {
    int32_t rows, channels;  // of the tensor
    int32_t block_rows, block_channels;
};

/// Where the scales and offsets of quantised keys or values lie: strides from one block to the next, and
/// what a block is.
struct CodesParams {
    OperandStrides scales, offsets;
    int32_t block_rows, block_channels;
};

/// Of the forward and decode kernels.
struct ForwardCodes {
    CodesParams key, value;
};

struct DequantizeParams {
    OperandStrides data, scales, offsets, out;  // scales and offsets: from one block to the next
    QuantBlocks blocks;
};

struct QuantizeParams {
    OperandStrides x, scales, zero_points, data;
    int64_t block_count;  // of all blocks
    QuantBlocks blocks;
    int32_t heads;
    int32_t row_blocks, channel_blocks;  // of one head
    // A simdgroup reads some rows of a block, a piece.
    int32_t pieces, piece_rows;  // of the rows of one head
    int32_t gathered;  // pieces of a block in all: of all heads where they share the scale
};

// What keeps a block from a scale. 0: nothing.
#define UMFA_FAULT_NONFINITE 1
#define UMFA_FAULT_TOO_LARGE 2

/// Of the lane map kernel.
struct LanesParams {
    int32_t row;  // elements from one row of the matrix to the next
};

}  // namespace umfa
