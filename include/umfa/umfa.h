/* umfa: exact attention on DLPack tensors. C interface, version 0 (may change until 1.0).
 *
 * Every function may be called from any thread, and no C++ exception leaves the library. The
 * library keeps no reference to a tensor after the call that took it.
 */
#ifndef UMFA_UMFA_H_
#define UMFA_UMFA_H_

#include <stddef.h>
#include <stdint.h>

#include "umfa/dlpack.h"

#if defined(UMFA_BUILDING) || defined(__GNUC__)
#define UMFA_API __attribute__((visibility("default")))
#else
#define UMFA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum umfa_status {
    UMFA_OK = 0,
    UMFA_ERROR_VALUE = 1,         /* an argument has an impossible value */
    UMFA_ERROR_TYPE = 2,          /* an argument has the wrong dtype */
    UMFA_ERROR_UNSUPPORTED = 3,   /* sound, but umfa cannot do it (yet) */
    UMFA_ERROR_OUT_OF_MEMORY = 4, /* an allocation failed */
    UMFA_ERROR_INTERNAL = 5,      /* a bug in umfa */
    UMFA_ERROR_DEVICE = 6         /* a GPU or its driver failed; the next call starts afresh */
} umfa_status;

typedef enum umfa_layout {
    UMFA_LAYOUT_BSHD = 0, /* (batch, seqlen, nheads, head_dim) */
    UMFA_LAYOUT_BHSD = 1  /* (batch, nheads, seqlen, head_dim) */
} umfa_layout;

/* Where query i and key j have the same position. */
typedef enum umfa_alignment {
    UMFA_ALIGNMENT_BOTTOM_RIGHT = 0, /* j = i + seqlen_kv - seqlen_q: the last of both */
    UMFA_ALIGNMENT_TOP_LEFT = 1      /* j = i: the first of both */
} umfa_alignment;

/* How query . key is computed. */
typedef enum umfa_quant_mode {
    UMFA_QUANT_MODE_NONE = 0, /* in the tensors' dtype */
    UMFA_QUANT_MODE_SAGE = 1, /* query and key rounded to int8, a scale for each row; on the CPU */
    UMFA_QUANT_MODE_INT8 = 2  /* weights and value too, by tiles of keys */
} umfa_quant_mode;

typedef enum umfa_dtype {
    UMFA_DTYPE_UNSPECIFIED = 0,
    UMFA_DTYPE_FLOAT32 = 1,
    UMFA_DTYPE_FLOAT16 = 2,
    UMFA_DTYPE_BFLOAT16 = 3
} umfa_dtype;

typedef enum umfa_backend {
    UMFA_BACKEND_AUTO = 0, /* or what the environment variable UMFA_BACKEND names */
    UMFA_BACKEND_CPU = 1,
    UMFA_BACKEND_METAL = 2
} umfa_backend;

/* Begin with UMFA_ATTENTION_OPTIONS_INIT, then change what differs. Fields are only ever added at
 * the end; struct_size tells the library which of them the caller knows. Tensors that are NULL are
 * off. `int32_t` fields without another comment are 0 or 1. */
typedef struct umfa_attention_options {
    size_t struct_size; /* sizeof(umfa_attention_options) */
    int32_t layout;     /* umfa_layout */
    int32_t backend;    /* umfa_backend */

    /* ---- from src/core/options.def ---- */
    /* query i sees keys j <= i + seqlen_kv - seqlen_q */
    int32_t causal;
    /* umfa_alignment: which query and key have the same position, for causal, windows, chunks,
       slopes and rotary angles of all keys */
    int32_t causal_alignment;
    /* keys left and right of the diagonal that are seen; -1: all. causal makes right 0 */
    int64_t window_size_left, window_size_right;
    /* factor on the scores; 0: head_dim ** -0.5 (with qv both head dims count) */
    double softmax_scale;
    /* scores become softcap * tanh(score / softcap); 0: off */
    double softcap;
    /* float32, (nheads,) or (batch, nheads): adds -slope * |i + seqlen_kv - seqlen_q - j| */
    const DLTensor* alibi_slopes;
    /* broadcasts to (batch, nheads, seqlen_q, seqlen_kv) whatever the layout, and is never
       expanded. bool: true = attend; float32, float16, bfloat16: added to the scores */
    const DLTensor* attn_mask;
    /* > 0: a query sees only keys of its own chunk of so many positions */
    int64_t attention_chunk;
    /* (nheads,): one more logit for each head's softmax, without a value */
    const DLTensor* learnable_sink;
    /* query's shape with value's head_dim: adds qv . value to query . key. Layout BSHD */
    const DLTensor* qv;
    /* probability, below 1, with which a weight is left out */
    double dropout_p;
    /* with the same seed and offset the same weights are dropped */
    uint64_t dropout_seed;
    /* gives the same seed other weights to drop */
    uint64_t dropout_offset;
    /* into how many parts, at most, the keys of few queries are cut; 0: umfa's choice */
    int64_t num_splits;
    /* (batch + 1,): query is packed, (total_q, nheads, head_dim). Layout BSHD */
    const DLTensor* cu_seqlens_q;
    /* (batch + 1,): key and value are packed; beside block_table only the lengths count */
    const DLTensor* cu_seqlens_k;
    /* (batch,): rows of each query sequence that count */
    const DLTensor* seqused_q;
    /* (batch,): rows of each key sequence that count; of a cache, those in use */
    const DLTensor* seqused_k;
    /* (batch,): index of key's batch, or row of block_table, that belongs to each query */
    const DLTensor* cache_batch_idx;
    /* (batch,): first row of key, or of the sequence's pages, that counts */
    const DLTensor* cache_leftpad;
    /* (batch, pages of a sequence): key and value are pages, (pages, page_size, ...) */
    const DLTensor* block_table;
    /* a promise that is checked: no query sequence is longer */
    int64_t max_seqlen_q;
    /* likewise of the keys */
    int64_t max_seqlen_k;
    /* (batch, rows, nheads_kv, head_dim): written into key behind the rows in use, first */
    const DLTensor* new_key;
    /* likewise into value */
    const DLTensor* new_value;
    /* (positions, rotary_dim / 2): rotates queries, and new keys or else all keys */
    const DLTensor* rotary_cos;
    /* likewise */
    const DLTensor* rotary_sin;
    /* rotates the pairs (0, 1), (2, 3), ...; 0: one channel of each half */
    int32_t rotary_interleaved;
    /* position of the first key within its chunk: chunks begin where position + offset is a
       multiple of attention_chunk */
    int64_t attention_chunk_offset;
    /* (batch,): each query also sees the first so many keys (prefix-LM) */
    const DLTensor* prefix_lens;
    /* the same bits for a query whatever batch, split or number of queries it is computed with
       */
    int32_t batch_invariant;
    /* bounds of window_size below 0 count, -1 too: left -3 begins 3 keys right of the diagonal.
       2147483647, or two bounds whose sum is below 0: all keys (flash-attn 4) */
    int32_t window_offsets;
    /* (batch + 1,): new_key and new_value are packed, (total_new, nheads_kv, head_dim) */
    const DLTensor* cu_seqlens_k_new;
    /* (batch,): position of a sequence's first query and new key, for rotary angles; else the
       rows in use */
    const DLTensor* rotary_seqlens;
    /* umfa_dtype of the result; default: query's. If out is given, it must be out's dtype */
    int32_t out_dtype;
    /* key holds codes of this format, e.g. int4 block none float16 1 32 128, which
       docs/quantization.md explains; absent: numbers */
    const char* key_format;
    /* scales of such a key; absent where they lie inside of it */
    const DLTensor* key_scales;
    /* zero points or biases of such a key, where its format has them */
    const DLTensor* key_offsets;
    /* likewise of value */
    const char* value_format;
    /* likewise of value */
    const DLTensor* value_scales;
    /* likewise of value */
    const DLTensor* value_offsets;
    /* umfa_quant_mode: how query . key is computed */
    int32_t quant_mode;
    /* with a quant_mode, the mean of each channel of the keys is taken off before they are
       rounded, and its part of the scores added after */
    int32_t smooth_k;
} umfa_attention_options;

/* clang-format off */
#define UMFA_ATTENTION_OPTIONS_INIT \
    {sizeof(umfa_attention_options), UMFA_LAYOUT_BSHD, UMFA_BACKEND_AUTO, 0, 0, -1, -1, 0, \
     0, NULL, NULL, 0, NULL, NULL, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, -1, \
     -1, NULL, NULL, NULL, NULL, 1, 0, NULL, 0, 0, NULL, NULL, 0, NULL, NULL, NULL, NULL, \
     NULL, NULL, 0, 1}
/* clang-format on */
/* ---- end ---- */

/* out = softmax(query key^T * softmax_scale) value, per head; query head h reads key head
 * h / (nheads_q / nheads_kv).
 *
 * query, key, value: each float32, float16 or bfloat16; 4-dimensional in options->layout; any
 *   strides. head_dim 1 to 576; value's, 1 to 512, may differ. With options->cu_seqlens_q query
 *   and out are packed, (total_q, nheads, head_dim), likewise key and value with cu_seqlens_k.
 *   With options->new_key and new_value key and value are written: the rows that they gain.
 * out: written; query's shape with value's head_dim; float32, float16 or bfloat16;
 *   options->out_dtype, if given, must be this dtype; overlaps no input. If query, key, value and
 *   out do not all have the same dtype, arithmetic is float32.
 * lse: written unless NULL; float32, (batch, nheads, seqlen_q) whatever the layout, or with
 *   cu_seqlens_q (nheads, total_q): the natural logarithm of the sum of exp(score).
 * options: NULL means UMFA_ATTENTION_OPTIONS_INIT.
 * A query that sees no key, or none with a score above -infinity, gets 0 and an lse of -infinity.
 * On failure nothing is written. */
UMFA_API umfa_status umfa_attention_forward(const DLTensor* query, const DLTensor* key,
                                            const DLTensor* value, DLTensor* out, DLTensor* lse,
                                            const umfa_attention_options* options);

/* Whether umfa_attention_forward would accept these arguments, without computing anything. out and
 * lse are not needed. UMFA_OK, or the status that the call would return; umfa_last_error() then has
 * the reason. */
UMFA_API umfa_status umfa_attention_can_run(const DLTensor* query, const DLTensor* key,
                                            const DLTensor* value,
                                            const umfa_attention_options* options);

/* The same, recorded in a Metal command buffer of the caller's and neither committed nor waited
 * for: out holds the result when the command buffer has completed.
 *
 * metal_command_buffer: an id<MTLCommandBuffer> of the default device, not committed, with no encoder
 *   open. umfa opens an encoder of its own and ends it. The call is one command buffer, however long
 *   it takes: macOS ends those that take several seconds. umfa_attention_forward splits such a call.
 * The tensors: usually on kDLMetal (data is the id<MTLBuffer>, which the command buffer retains).
 *   Those in host memory must stay there until the command buffer has completed, and are refused
 *   where Metal cannot map them.
 * options->backend: UMFA_BACKEND_AUTO or UMFA_BACKEND_METAL. */
UMFA_API umfa_status umfa_attention_forward_encode(void* metal_command_buffer,
                                                   const DLTensor* query, const DLTensor* key,
                                                   const DLTensor* value, DLTensor* out,
                                                   DLTensor* lse,
                                                   const umfa_attention_options* options);

/* Compiles the GPU kernels that umfa_attention_forward needs for these arguments, so that its first
 * call does not wait for them, and computes nothing.
 *
 * All arguments: as umfa_attention_forward takes them; lse is NULL in both calls or in neither. The
 *   memory of float and bool tensors is neither read nor written. Tables (cu_seqlens_q, seqused_k,
 *   block_table, ...) are read, because they decide which kernels the call needs.
 * options->backend: the kernels are those of the backend that runs the call. The CPU backend
 *   compiles nothing, and the status is UMFA_OK.
 * Fails where umfa_attention_forward fails, and where Metal cannot compile a kernel. One call
 * prepares all calls with the same options, dtypes, head dims and layouts of the tensors; the chapter
 * "The first call" of docs/backends.md lists the exceptions. */
UMFA_API umfa_status umfa_attention_warmup(const DLTensor* query, const DLTensor* key,
                                           const DLTensor* value, const DLTensor* out,
                                           const DLTensor* lse,
                                           const umfa_attention_options* options);

/* Gradients to be written, NULL where one is not wanted. Begin with UMFA_ATTENTION_GRADIENTS_INIT;
 * struct_size is as in umfa_attention_options. Each has the shape of what it belongs to, any strides,
 * and its dtype or float32. */
typedef struct umfa_attention_gradients {
    size_t struct_size; /* sizeof(umfa_attention_gradients) */
    DLTensor *dquery, *dkey, *dvalue;
    DLTensor* dqv;           /* of options->qv */
    DLTensor* dmask;         /* of a float options->attn_mask, summed where that broadcasts */
    DLTensor* dsinks;        /* of options->learnable_sink */
    DLTensor* dalibi_slopes; /* of options->alibi_slopes */
} umfa_attention_gradients;

/* clang-format off */
#define UMFA_ATTENTION_GRADIENTS_INIT \
    {sizeof(umfa_attention_gradients), NULL, NULL, NULL, NULL, NULL, NULL, NULL}
/* clang-format on */

/* The gradients of a call of umfa_attention_forward, from those of its results.
 *
 * query, key, value, options: of that call. Pages and new keys are not supported.
 * out, lse: what it gave.
 * dout: the gradient of out; out's shape; float32, float16 or bfloat16.
 * dlse: the gradient of lse; float32, lse's shape; NULL: 0.
 * gradients: at least one. They overlap neither one another nor an input.
 * Arithmetic is float32, sums have the same order in every run, and rows that see no key have a
 * gradient of 0 and add nothing to others. On failure nothing is written. */
UMFA_API umfa_status umfa_attention_backward(const DLTensor* query, const DLTensor* key,
                                             const DLTensor* value, const DLTensor* out,
                                             const DLTensor* lse, const DLTensor* dout,
                                             const DLTensor* dlse,
                                             const umfa_attention_gradients* gradients,
                                             const umfa_attention_options* options);

/* Whether umfa_attention_backward would accept these arguments, without computing or writing
 * anything; as umfa_attention_can_run. */
UMFA_API umfa_status umfa_attention_backward_can_run(const DLTensor* query, const DLTensor* key,
                                                     const DLTensor* value, const DLTensor* out,
                                                     const DLTensor* lse, const DLTensor* dout,
                                                     const DLTensor* dlse,
                                                     const umfa_attention_gradients* gradients,
                                                     const umfa_attention_options* options);

/* Merges results of attention over parts of the keys into that over all of them.
 *
 * out_partial: float32, float16 or bfloat16, (parts, batch, seqlen_q, nheads, head_dim) or
 *   (parts, total_q, nheads, head_dim), any strides; head_dim 1 to 512.
 * lse_partial: float32, out_partial's shape without head_dim: the natural log-sum-exp of each part.
 *   A part with -infinity saw no key, and its result does not count.
 * out: written; out_partial's shape without the parts; float32, float16 or bfloat16.
 * lse: written; float32, out's shape without head_dim.
 * backend: umfa_backend.
 * Where no part saw a key, out is 0 and lse -infinity. */
UMFA_API umfa_status umfa_attention_combine(const DLTensor* out_partial,
                                            const DLTensor* lse_partial, DLTensor* out,
                                            DLTensor* lse, int32_t backend);

/* Whether umfa_attention_combine would accept these arguments, as umfa_attention_can_run. */
UMFA_API umfa_status umfa_attention_combine_can_run(const DLTensor* out_partial,
                                                    const DLTensor* lse_partial, int32_t backend);

/* Compiles the GPU kernel that umfa_attention_combine needs for these arguments, as
 * umfa_attention_warmup. */
UMFA_API umfa_status umfa_attention_combine_warmup(const DLTensor* out_partial,
                                                   const DLTensor* lse_partial, const DLTensor* out,
                                                   const DLTensor* lse, int32_t backend);

/* The weights of umfa_attention_forward as a matrix, for looking at small problems.
 *
 * query, key, options: as umfa_attention_forward takes them, without qv, block_table and new_key.
 * weights: written; (batch, nheads, seqlen_q, seqlen_kv) whatever the layout, of the longest
 *   sequences; query's dtype. Weights as they are before dropout, negative where it drops; 0 for
 *   pairs of query and key that are not there. */
UMFA_API umfa_status umfa_attention_weights(const DLTensor* query, const DLTensor* key,
                                            DLTensor* weights,
                                            const umfa_attention_options* options);

/* The message of the last failing call on this thread, "[function] what; got ...; expected ...".
 * Never NULL; valid until the next failing call on this thread. */
UMFA_API const char* umfa_last_error(void);

/* "0.1.0" */
UMFA_API const char* umfa_version(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* UMFA_UMFA_H_ */
