// The constants that specialise a kernel for a problem, and how they reach it.
//
// umfa's own executor gives them as Metal function constants: one compiled text serves all problems.
// PyTorch's compile_shader and MLX's metal_kernel have none. For these the planner writes
// UMFA_INLINE_CONSTANTS and a value for each constant as #define lines in front of the text
// (src/metal/kernel_text.h).
#pragma once

// X(INDEX, TYPE, NAME)
#define UMFA_CONSTANTS(X)                                                                   \
    X(0, bool, has_lse)                                                                     \
    X(1, int, mask_kind) /* one of UMFA_MASK_ below; so are the other kinds */              \
    X(2, bool, has_mask)                                                                    \
    X(3, bool, has_alibi)                                                                   \
    X(4, bool, has_softcap)                                                                 \
    /* Scores are q.k alone, and the scale lies between 1e-30 and 1: it can wait for the */ \
    /* exponent, where it costs nothing. */                                                 \
    X(5, bool, scale_last)                                                                  \
    X(6, bool, unit_channels) /* every channel stride is 1 */                               \
    /* Rows of K and V start on 16 bytes and their channels come in whole 16 bytes. */      \
    X(7, bool, wide_loads)                                                                  \
    /* Less than 2^31 elements lie between rows of a tile or a page of K and V, and */      \
    /* between neighbouring pages. */                                                       \
    X(8, bool, near_rows)                                                                   \
    X(9, bool, has_chunk)                                                                   \
    /* Sequences lie where a buffer says, and threadgroups find what they do in a list */   \
    /* of tasks. */                                                                         \
    X(10, bool, has_sequences)                                                              \
    /* Row r of a sequence is row r % page_size of the page that the table has at */        \
    /* r / page_size. */                                                                    \
    X(11, bool, has_pages)                                                                  \
    X(12, bool, has_sinks)                                                                  \
    X(13, int, sink_kind)                                                                   \
    X(14, bool, has_rotary)   /* queries are rotated; by append.metal, new keys */          \
    X(15, bool, rotates_keys) /* each time they are staged */                               \
    /* Channels 2 i and 2 i + 1 are a pair; else i and i + channels / 2. */                 \
    X(16, bool, rotary_interleaved)                                                         \
    X(17, int, rotary_kind)                                                                 \
    X(18, bool, has_dropout)                                                                \
    /* Queries have a second part, which meets the values: scores are q.k + qv.v. */        \
    X(19, bool, has_qv)                                                                     \
    /* Keys are rotated 32 bytes at a time: their rows allow wide_loads, the angles are */  \
    /* float32 with rows on 16 bytes, and the rotated channels come in whole 32 bytes. */   \
    X(20, bool, wide_rotary)                                                                \
    X(21, bool, has_prefix) /* some sequence has keys that all its queries see */           \
    /* Dtypes of tensors; NONE: the kernel's own. Others only in float kernels. */          \
    X(22, int, query_kind) /* and qv */                                                     \
    X(23, int, key_kind)                                                                    \
    X(24, int, value_kind)                                                                  \
    X(25, int, out_kind)                                                                    \
    X(26, int, new_key_kind)                                                                \
    X(27, int, new_value_kind)                                                              \
    X(28, bool, unit_mask) /* the mask's column stride is 1 */                              \
    /* Also, the mask consists of column pairs (2n, 2n + 1) that one aligned load reads. */ \
    X(29, bool, wide_mask)                                                                  \
    X(30, bool, shifts_pages) /* page_size is 2 to the power of params.pages */             \
    /* The grid begins at params.origin. If every launch added it, D = 64 would spill */    \
    /* (ptxas, sm_90, four threadgroups a multiprocessor: 40 bytes). */                     \
    X(31, bool, is_slice)                                                                   \
    /* Rows of the forward kernel are all queries of all heads that share a key head. */    \
    X(32, bool, packs_heads)                                                                \
    /* Of a backward pass: dtypes of dO and of the results, F32 where that is not the */    \
    /* kernel's own; and what is wanted. */                                                 \
    X(33, int, dout_kind)                                                                   \
    X(34, int, dq_kind)                                                                     \
    X(35, int, dk_kind)                                                                     \
    X(36, int, dv_kind)                                                                     \
    X(37, bool, wants_dk)                                                                   \
    X(38, bool, wants_dv)                                                                   \
    X(39, bool, has_dlse)                                                                   \
    X(40, bool, whole_channels) /* the head dims are the kernel's own */                    \
    X(41, int, dmask_kind)                                                                  \
    X(42, bool, wants_dq)                                                                   \
    X(43, bool, wants_dslopes)                                                              \
    X(44, int, dqv_kind)                                                                    \
    X(45, bool, wants_dqv)                                                                  \
    /* Keys of the forward kernel's tiles lie as key_order.h says, and the mask of a */     \
    /* lane's keys is aligned. */                                                           \
    X(46, bool, mask_runs)                                                                  \
    /* Of a quantised format: UMFA_CODES_, UMFA_SCALES_ and UMFA_OFFSET_ of */              \
    /* quant_format.h; which buffers a kernel has. */                                       \
    X(47, int, code_kind)                                                                   \
    X(48, int, scale_kind)                                                                  \
    X(49, int, offset_kind)                                                                 \
    X(50, bool, has_scales)                                                                 \
    X(51, bool, has_offsets)                                                                \
    X(52, bool, has_ranges)                                                                 \
    X(53, bool, has_faults)                                                                 \
    /* How attention reads quantised keys and values, as code_kinds.h packs it; 0: they */  \
    /* are numbers. And which buffers there are. */                                         \
    X(54, int, key_codes)                                                                   \
    X(55, int, value_codes)                                                                 \
    X(56, bool, has_codes)                                                                  \
    X(57, bool, has_key_scales)                                                             \
    X(58, bool, has_key_offsets)                                                            \
    X(59, bool, has_value_scales)                                                           \
    X(60, bool, has_value_offsets)                                                          \
    /* A kernel has read the tables of sequences, and made the list of tasks. */            \
    X(61, bool, has_device_tables)

// Values of mask_kind. The other kinds use them too, except BOOL.
#define UMFA_MASK_NONE 0
#define UMFA_MASK_BOOL 1
#define UMFA_MASK_F32 2
#define UMFA_MASK_F16 3
#define UMFA_MASK_BF16 4
// Of key_kind and value_kind alone: bytes of a quantised format.
#define UMFA_KIND_CODES 5

#ifdef __METAL_VERSION__

// UMFA_BUFFER_IF: a buffer that a kernel has only where a constant is true. An inline constant does
// not take it out of the signature: the caller then binds any memory there.
#ifdef UMFA_INLINE_CONSTANTS
#define UMFA_CONSTANT(INDEX, TYPE, NAME) constant constexpr TYPE NAME = UMFA_VALUE_##NAME;
#define UMFA_BUFFER_IF(INDEX, NAME) [[buffer(INDEX)]]
#else
#define UMFA_CONSTANT(INDEX, TYPE, NAME) constant TYPE NAME [[function_constant(INDEX)]];
#define UMFA_BUFFER_IF(INDEX, NAME) [[buffer(INDEX), function_constant(NAME)]]
#endif
UMFA_CONSTANTS(UMFA_CONSTANT)
#undef UMFA_CONSTANT

#endif
