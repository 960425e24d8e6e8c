// Buffer and function constant indices of the kernels: one list for the shaders and the planner.
//
// Macros, since Metal's attributes and the host's switch statements both take them.
#pragma once

#define UMFA_BUFFER_QUERY 0
#define UMFA_BUFFER_KEY 1
#define UMFA_BUFFER_VALUE 2
#define UMFA_BUFFER_OUT 3
#define UMFA_BUFFER_LSE 4
#define UMFA_BUFFER_MASK 5
#define UMFA_BUFFER_SLOPES 6
#define UMFA_BUFFER_PARAMS 7
#define UMFA_BUFFER_PARTIAL_OUT 8    // split-KV: what each split found
#define UMFA_BUFFER_PARTIAL_STATE 9  // and its (reference, sum)
#define UMFA_BUFFER_SINKS 10
#define UMFA_BUFFER_SEQUENCES 11
#define UMFA_BUFFER_TASKS 12
#define UMFA_BUFFER_PAGES 13
#define UMFA_BUFFER_ROTARY_COS 14
#define UMFA_BUFFER_ROTARY_SIN 15
#define UMFA_BUFFER_NEW_KEY 16
#define UMFA_BUFFER_NEW_VALUE 17
#define UMFA_BUFFER_QV 18

#define UMFA_CONSTANT_HAS_LSE 0
#define UMFA_CONSTANT_MASK_KIND 1
#define UMFA_CONSTANT_HAS_MASK 2
#define UMFA_CONSTANT_HAS_ALIBI 3
#define UMFA_CONSTANT_HAS_SOFTCAP 4
#define UMFA_CONSTANT_SCALE_LAST 5
#define UMFA_CONSTANT_UNIT_CHANNELS 6
#define UMFA_CONSTANT_WIDE_LOADS 7
#define UMFA_CONSTANT_IS_SPLIT 8
#define UMFA_CONSTANT_HAS_CHUNK 9
#define UMFA_CONSTANT_HAS_SEQUENCES 10
#define UMFA_CONSTANT_HAS_PAGES 11
#define UMFA_CONSTANT_HAS_SINKS 12
#define UMFA_CONSTANT_SINK_KIND 13
#define UMFA_CONSTANT_HAS_ROTARY 14
#define UMFA_CONSTANT_ROTATES_KEYS 15
#define UMFA_CONSTANT_ROTARY_INTERLEAVED 16
#define UMFA_CONSTANT_ROTARY_KIND 17
#define UMFA_CONSTANT_HAS_DROPOUT 18
#define UMFA_CONSTANT_HAS_QV 19
#define UMFA_CONSTANT_WIDE_ROTARY 20

// Values of mask_kind; those of floats of sink_kind and rotary_kind too.
#define UMFA_MASK_NONE 0
#define UMFA_MASK_BOOL 1
#define UMFA_MASK_F32 2
#define UMFA_MASK_F16 3
#define UMFA_MASK_BF16 4
