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

typedef enum umfa_causal {
    UMFA_CAUSAL_NONE = 0,
    UMFA_CAUSAL_BOTTOM_RIGHT = 1, /* query i sees keys j <= i + seqlen_kv - seqlen_q */
    UMFA_CAUSAL_TOP_LEFT = 2      /* query i sees keys j <= i */
} umfa_causal;

typedef enum umfa_backend {
    UMFA_BACKEND_AUTO = 0, /* or what the environment variable UMFA_BACKEND names */
    UMFA_BACKEND_CPU = 1,
    UMFA_BACKEND_METAL = 2
} umfa_backend;

/* Begin with UMFA_ATTENTION_OPTIONS_INIT, then change what differs. Fields are only ever added at
 * the end; struct_size tells the library which of them the caller knows. */
typedef struct umfa_attention_options {
    size_t struct_size;           /* sizeof(umfa_attention_options) */
    int32_t layout;               /* umfa_layout */
    int32_t causal;               /* umfa_causal */
    int64_t window_left;          /* keys left of the diagonal that are seen; -1: all */
    int64_t window_right;         /* likewise right of it; ignored when causal */
    double softmax_scale;         /* 0: head_dim ** -0.5 */
    double softcap;               /* scores become softcap * tanh(score / softcap); 0: off */
    const DLTensor* alibi_slopes; /* float32, (nheads,) or (batch, nheads); NULL: off. Adds
                                     -slope * |i + seqlen_kv - seqlen_q - j| to the scores */
    int32_t backend;              /* umfa_backend */
    int32_t reserved;             /* 0 */
    const DLTensor* attn_mask;    /* at most 4-dimensional, broadcasts to (batch, nheads, seqlen_q,
                                     seqlen_kv) whatever the layout, and is never expanded; NULL: off.
                                     bool: true = attend; float: added to the scores */
} umfa_attention_options;

#define UMFA_ATTENTION_OPTIONS_INIT  \
    {sizeof(umfa_attention_options), \
     UMFA_LAYOUT_BSHD,               \
     UMFA_CAUSAL_NONE,               \
     -1,                             \
     -1,                             \
     0,                              \
     0,                              \
     NULL,                           \
     UMFA_BACKEND_AUTO,              \
     0,                              \
     NULL}

/* out = softmax(query key^T * softmax_scale) value, per head; query head h reads key head
 * h / (nheads_q / nheads_kv).
 *
 * query, key, value: float32, float16 or bfloat16, all the same, 4-dimensional in options->layout,
 *   any strides. head_dim 1 to 576; value's, 1 to 512, may differ.
 * out: written; query's shape with value's head_dim, query's dtype; overlaps no input.
 * lse: written unless NULL; float32, (batch, nheads, seqlen_q) whatever the layout: the natural
 *   logarithm of the sum of exp(score).
 * options: NULL means UMFA_ATTENTION_OPTIONS_INIT.
 * A query that sees no key, or none with a score above -infinity, gets 0 and an lse of -infinity.
 * On failure nothing is written. */
UMFA_API umfa_status umfa_attention_forward(const DLTensor* query, const DLTensor* key,
                                            const DLTensor* value, DLTensor* out, DLTensor* lse,
                                            const umfa_attention_options* options);

/* The same, recorded in a Metal command buffer of the caller's and neither committed nor waited
 * for: out holds the result when the command buffer has completed.
 *
 * metal_command_buffer: an id<MTLCommandBuffer> of the default device, not committed, with no encoder
 *   open. umfa opens an encoder of its own and ends it.
 * The tensors: usually on kDLMetal (data is the id<MTLBuffer>, which the command buffer retains).
 *   Those in host memory must stay there until the command buffer has completed, and are refused
 *   where Metal cannot map them.
 * options->backend: UMFA_BACKEND_AUTO or UMFA_BACKEND_METAL. */
UMFA_API umfa_status umfa_attention_forward_encode(void* metal_command_buffer,
                                                   const DLTensor* query, const DLTensor* key,
                                                   const DLTensor* value, DLTensor* out,
                                                   DLTensor* lse,
                                                   const umfa_attention_options* options);

/* What the last failing call on this thread had to say, "[function] what; got ...; expected ...".
 * Never NULL; valid until the next failing call on this thread. */
UMFA_API const char* umfa_last_error(void);

/* "0.1.0" */
UMFA_API const char* umfa_version(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* UMFA_UMFA_H_ */
