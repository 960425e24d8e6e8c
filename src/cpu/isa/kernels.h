// The interface between the CPU backend and its kernels: plain structs and function pointers.
// Kernel files are compiled with instructions the running CPU may lack, so nothing here may emit
// code, and they include no standard library header that does.
#pragma once

#include <stdint.h>

#include "core/constants.h"
#include "shared/philox.h"
#include "shared/visible.h"

namespace umfa::cpu {

/// One operand of a kernel: first element, and strides in elements.
struct Rows {
    void* data;
    int64_t stride_batch, stride_head, stride_row, stride_channel;
};

/// What the bytes of key or value mean: see core/quant_operand.h. Strides of scales and offsets are in
/// bytes, from one block to the next; 0 where one spans the dimension.
struct Codes {
    bool given;  // else the operand holds numbers
    int codes, scale_kind, offset_kind;
    int64_t block_rows, block_channels;
    const char *scales, *offsets;  // null: scales lie in the rows; there are no offsets
    struct Strides {
        int64_t batch, head, row, channel;
    } scale_strides, offset_strides;
};

/// One sequence of the batch: where its rows begin, and which keys its queries see.
struct Sequence {
    int64_t query_batch, query_row;  // its first row in query, out and lse
    int64_t kv_batch, kv_row;        // its first key; with pages kv_row is a row of all of them
    int64_t seqlen_q, seqlen_kv;
    Visible<int64_t> visible;
    int64_t position_q;    // of its first query and new key, for rotary angles
    const int32_t* pages;  // batch index of every page_size rows; null: they follow each other
    int64_t new_batch, new_row;  // its first new key
    int64_t new_rows;            // how many; they are the last of its seqlen_kv
};

/// Element type of a mask or of another table; none: there is no table.
enum class ElementType : int32_t { none, boolean, f32, f16, bf16 };

/// cos and sin by position and pair of channels.
struct Rotary {
    const void *cos, *sin;
    int64_t cos_stride_position, cos_stride_channel, sin_stride_position, sin_stride_channel;
    ElementType element;  // none: off
    int64_t channels;     // how many are rotated
    bool interleaved;     // pairs (0, 1), (2, 3), ...; else one from each half
    bool advances;        // query i stands at position_q + i; else all stand at position_q
    bool keys;            // key j is rotated too, by the angles of position j
};

/// Dense mask: boolean, true = attend, or numbers to be added. Stride 0 where it broadcasts.
struct Mask {
    const void* data;
    int64_t stride_batch, stride_head, stride_row, stride_key;
    ElementType element;
};

/// New rows of key and value.
struct Append {
    Rows key, value;
    int64_t heads;
};

/// Dropout as in shared/philox.h. Index b of the batch is `batch_first` + b * `batch_step` there.
struct Dropout {
    PhiloxKey key;
    uint32_t threshold;  // 0: nothing is dropped
    float kept;          // 1 - p
    int64_t batch_first, batch_step;
};

/// Element types of the tensors, for the kernels `mixed`.
struct Types {
    ElementType query, key, value, out, new_key, new_value;
};

struct ForwardArgs {
    // For the `mixed` kernels, strides are in bytes, except channel strides.
    Rows query, key, value, out;
    Codes key_codes, value_codes;  // mixed kernels only
    Rows qv;                    // qv.value is added to query.key; data is null when there is none
    Rows lse;                   // data is null when not asked for
    const Sequence* sequences;  // one for each index of the batch
    int64_t page_size;
    int64_t group;  // query heads that share one key head
    int64_t head_dim, head_dim_v;
    Mask mask;
    Rotary rotary;
    Append append;
    Types types;
    Dropout dropout;
    float score_scale;      // multiplies q.k; holds log2(e) unless softcap is on
    float score_scale_low;  // what rounding score_scale to float left over
    float softcap;          // softcap * log2(e); 0: off
    const float* slopes;    // ALiBi, null: off
    int64_t slopes_stride_batch, slopes_stride_head;
    const float* sinks;  // one logit for each query head, times log2(e); null: off
    /// Of scores in int8: the mean of each channel of the keys, [batch][key head][means_pitch]; null:
    /// nothing is taken off the keys.
    const float* key_means;
    int64_t means_pitch, heads_kv;
    int64_t block_q;  // query rows per task, a multiple of `lanes`
};

/// Queries [first, first + block_q) of one head.
struct Block {
    int64_t sequence, head, first;
};

/// `next`: the block that this thread will probably be given after this one, or null; its first
/// rows are fetched meanwhile. `scratch`: scratch_floats() floats, 64-byte aligned, contents
/// undefined.
using ForwardFn = void (*)(const ForwardArgs&, const Block& block, const Block* next,
                           float* scratch);

struct ForwardKernel {
    ForwardFn run;
    int64_t (*scratch_floats)(const ForwardArgs&);
    int64_t most_rows, most_floats;  // of a block of queries, and of its Q and O
};

/// Those of most kernels. A tile of K and V is packed once per block, so large blocks are cheaper (D=64:
/// 6 % from 128 to 256 rows, 1 % more to 512), as long as Q and O stay in the L2 cache: 256 KiB.
constexpr int64_t most_block_rows = 512, most_block_floats = 64 * 1024;

/// Few queries over many keys.
struct DecodeKernel {
    /// All queries of the key heads [head_begin, head_end), over keys [key_begin, key_end), a
    /// multiple of 64. `part`: for each key head group * seqlen_q rows of row_floats() floats
    /// for merge(), or null: these are all the keys, and the result is written.
    void (*run)(const ForwardArgs&, int64_t batch, int64_t head_begin, int64_t head_end,
                int64_t key_begin, int64_t key_end, float* scratch, float* part);
    /// Writes one row from its parts, which lie `stride` floats apart.
    void (*merge)(const ForwardArgs&, int64_t batch, int64_t head, int64_t row, const float* part,
                  int64_t stride, int64_t parts, float* scratch);
    int64_t (*scratch_floats)(const ForwardArgs&, int64_t heads, int64_t seqlen_q);
    int64_t (*row_floats)(const ForwardArgs&);
};

/// Tensors of one backward pass. Strides are in bytes, except channel strides.
struct BackwardArgs {
    Rows query, key, value, qv, out, dout;
    Rows dquery, dkey, dvalue, dqv;  // data is null where they are not wanted
    struct {
        ElementType query, key, value, out, dout, dquery, dkey, dvalue, dqv;
    } types;
    Rows lse, dlse;             // float32; dlse: data is null when there is none
    const Sequence* sequences;  // one for each index of the batch
    int64_t group;              // query heads that share one key head
    int64_t head_dim, head_dim_v;
    Mask mask;
    Rotary rotary;
    Dropout dropout;
    float score_scale, score_scale_low, softcap;  // as in ForwardArgs
    float gradient_scale;                         // softmax_scale: of q.k in the score
    const float* slopes;                          // ALiBi, null: off
    int64_t slopes_stride_batch, slopes_stride_head;
    /// Of each row: log-sum-exp in units of log2, as two floats (+inf where the row saw no key), and
    /// delta = sum(dout * out) - dlse. Heads of a sequence follow each other, each padded to a multiple
    /// of 64 rows, whose pivot is +inf.
    float *pivot, *pivot_low, *delta;
    const int64_t* first_row;  // of each sequence in these arrays
};

/// A head of one sequence.
struct SequenceHead {
    int64_t sequence, head;
};

/// Sums that tasks have in common: of dQ over the blocks of keys, and of the mask's gradient over heads.
/// Each task has all queries of one block of keys. It takes one tile of queries of one head at a time, and
/// waits until the tasks before it have done so: then the order of the terms is the same however many
/// tasks run at once.
struct SharedSums {
    float* dquery;       // [head of the task][query][channel], padded; null where it is not wanted
    float* dmask;        // of the block: [head][panel of queries][key][lane]
    int64_t dmask_head;  // floats from head to head; 0: they are summed
    bool first_keys, last_keys;    // the block begins, or ends, the sums of dquery
    bool first_heads, last_heads;  // and the heads those of dmask
    void* context;
    /// Returns when all tasks before this one have finished the step. Steps are the tiles of queries of
    /// the first head, then those of the next.
    void (*wait)(void* context, int64_t step);
    void (*finish)(void* context, int64_t step);
};

/// What a task of a backward pass computes: queries [query_begin, query_end) and keys
/// [key_begin, key_end) of some heads, as far as their sequences reach. Queries begin at a multiple of
/// 128, keys at one of BackwardSizes::key_block. Gradients that are summed over keys or queries must have
/// all of them in one task, unless they are shared.
struct BackwardTask {
    const SequenceHead* heads;  // with dkey and dvalue: those that share the key head
    int64_t head_count;
    int64_t query_begin, query_end, key_begin, key_end;
    bool dquery, dkey;  // with dkey dvalue too, and both only as far as they are wanted
    /// Where the gradient of the mask goes; data is null where it is not wanted. Without sums_mask each
    /// pair of query and key has a place of its own there, and those that see nothing are left out.
    /// With it, what the heads have in common is summed over them, and with stride 0 over that
    /// dimension too; then every place is written.
    Mask dmask;
    bool sums_mask;
    /// The gradient of the slope for each head and block of keys of its sequence, [head][block]; null
    /// where it is not wanted. The kernel writes those of its own blocks.
    float* dslopes;
    int64_t dslopes_pitch;
    /// null: the task shares no sums with others. Else it has one block of keys and all queries, counted by
    /// the mask: a sequence may be shorter.
    const SharedSums* shared;
};

struct BackwardSizes {
    int64_t key_block;  // where tasks may cut the keys
    int64_t
        query_tile;  // what a task computes at once; the rows of SharedSums are a multiple of it
    int64_t dquery_pitch;  // floats of a row of SharedSums::dquery
};

struct BackwardKernel {
    /// Fills pivot, pivot_low and delta of one head.
    void (*prepare)(const BackwardArgs&, const SequenceHead&);
    /// `scratch`: scratch_floats() floats, 64-byte aligned, contents undefined.
    void (*run)(const BackwardArgs&, const BackwardTask&, float* scratch);
    int64_t (*scratch_floats)(const BackwardArgs&, const BackwardTask&);
    BackwardSizes (*sizes)(const BackwardArgs&);
};

/// Appends one row to key and value of a sequence, rotated where args.rotary is on.
using AppendRowFn = void (*)(const ForwardArgs&, int64_t batch, int64_t row);

/// Weighted sums of rows. `stride`: from one channel to the next, in elements. `sum` has
/// `channels` floats, and room up to a whole vector.
struct CombineKernel {
    /// sum += weight * row.
    void (*add)(const void* row, int64_t stride, int64_t channels, float weight, float* sum);
    /// row = sum.
    void (*store)(const float* sum, int64_t channels, void* row, int64_t stride);
};

/// What each channel of some rows needs: pointers to one value for each.
struct ChannelScales {
    float *scale, *inverse;
    float* offset;  // zero points as numbers
};

/// Quantised rows. See isa/quant_rows.h and isa/codes.h.
struct QuantKernel {
    void (*widen)(const float* row, int64_t channels, bool magnitude_only, uint32_t* magnitude,
                  float* low, float* high);
    void (*encode)(int codes, const float* x, int64_t channels, const ChannelScales& scales,
                   uint8_t* bytes, uint8_t* to);
    /// The numbers of one row of codes, which is row `at` of a head.
    void (*numbers)(const Codes& codes, const void* row, int64_t batch, int64_t head, int64_t at,
                    int64_t channels, float* to);
};

struct DtypeKernels {
    ForwardKernel forward;
    DecodeKernel decode;
    AppendRowFn append_row;
    CombineKernel combine;
};

/// Scores in int8, and with `values` weights and values too: see isa/int8_scores.h and isa/int8_values.h.
struct Int8Kernel {
    ForwardKernel scores, values;
    /// Writes the means of the keys of one key head.
    void (*key_means)(const ForwardArgs&, int64_t batch, int64_t head, float* to);
};
struct Int8Kernels {
    Int8Kernel f32, f16, bf16, mixed;
};

struct Kernels {
    const char* name;
    const Kernels* base;  // has the kernels that are null here
    int lanes;            // queries that one panel holds
    DtypeKernels f32, f16, bf16;
    DtypeKernels mixed;            // for tensors of different types, float32 arithmetic; no combine
    BackwardKernel backward;       // of any types, float32 arithmetic
    BackwardKernel backward_bf16;  // of bfloat16 query, key, value and dout; null: the one above
    QuantKernel quant;
    Int8Kernels int8;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_bf16_kernels;
/// Those of avx512_kernels that gain by VNNI. No set of its own: integers are exact, so it has the same
/// bits.
extern const Kernels avx512_vnni_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels, neon_bf16_kernels;
#endif

}  // namespace umfa::cpu
