// Buffer indices of the kernels, for the shaders and the planner. Each kernel has a layout of its
// own, without gaps: Metal has 31 buffers a kernel.
#pragma once

// Buffers of forward.metal.
#define UMFA_FORWARD_QUERY 0
#define UMFA_FORWARD_KEY 1
#define UMFA_FORWARD_VALUE 2
#define UMFA_FORWARD_OUT 3
#define UMFA_FORWARD_LSE 4
#define UMFA_FORWARD_MASK 5
#define UMFA_FORWARD_SLOPES 6
#define UMFA_FORWARD_SINKS 7
#define UMFA_FORWARD_SEQUENCES 8
#define UMFA_FORWARD_TASKS 9
#define UMFA_FORWARD_PAGES 10
#define UMFA_FORWARD_ROTARY_COS 11
#define UMFA_FORWARD_ROTARY_SIN 12
#define UMFA_FORWARD_QV 13
#define UMFA_FORWARD_SPLIT 14
#define UMFA_FORWARD_PARTIAL_OUT 15    // split-KV, as of decode
#define UMFA_FORWARD_PARTIAL_STATE 16  //
#define UMFA_FORWARD_KEY_SCALES 17     // of quantised keys and values
#define UMFA_FORWARD_KEY_OFFSETS 18
#define UMFA_FORWARD_VALUE_SCALES 19
#define UMFA_FORWARD_VALUE_OFFSETS 20
#define UMFA_FORWARD_CODES 21
#define UMFA_FORWARD_PARAMS 22
#define UMFA_FORWARD_BUFFERS 23

// Buffers of umfa_decode of decode.metal, and of umfa_decode_vector of decode_vector.metal.
#define UMFA_DECODE_QUERY 0
#define UMFA_DECODE_KEY 1
#define UMFA_DECODE_VALUE 2
#define UMFA_DECODE_OUT 3
#define UMFA_DECODE_LSE 4
#define UMFA_DECODE_MASK 5
#define UMFA_DECODE_SLOPES 6
#define UMFA_DECODE_SINKS 7
#define UMFA_DECODE_SEQUENCES 8
#define UMFA_DECODE_TASKS 9
#define UMFA_DECODE_PAGES 10
#define UMFA_DECODE_ROTARY_COS 11
#define UMFA_DECODE_ROTARY_SIN 12
#define UMFA_DECODE_PARTIAL_OUT 13    // split-KV: what each split found
#define UMFA_DECODE_PARTIAL_STATE 14  // and its (reference, sum)
#define UMFA_DECODE_KEY_SCALES 15     // of quantised keys and values
#define UMFA_DECODE_KEY_OFFSETS 16
#define UMFA_DECODE_VALUE_SCALES 17
#define UMFA_DECODE_VALUE_OFFSETS 18
#define UMFA_DECODE_CODES 19
#define UMFA_DECODE_PARAMS 20
#define UMFA_DECODE_BUFFERS 21

// Buffers of umfa_decode_merge of decode.metal.
#define UMFA_MERGE_PARTIAL_OUT 0
#define UMFA_MERGE_PARTIAL_STATE 1
#define UMFA_MERGE_OUT 2
#define UMFA_MERGE_LSE 3
#define UMFA_MERGE_SINKS 4
#define UMFA_MERGE_SEQUENCES 5
#define UMFA_MERGE_TASKS 6
#define UMFA_MERGE_PARAMS 7
#define UMFA_MERGE_BUFFERS 8

// Buffers of append.metal.
#define UMFA_APPEND_KEY 0
#define UMFA_APPEND_VALUE 1
#define UMFA_APPEND_NEW_KEY 2
#define UMFA_APPEND_NEW_VALUE 3
#define UMFA_APPEND_SEQUENCES 4
#define UMFA_APPEND_TASKS 5
#define UMFA_APPEND_PAGES 6
#define UMFA_APPEND_ROTARY_COS 7
#define UMFA_APPEND_ROTARY_SIN 8
#define UMFA_APPEND_PARAMS 9
#define UMFA_APPEND_BUFFERS 10

// Buffers of clear.metal.
#define UMFA_CLEAR_OUT 0
#define UMFA_CLEAR_LSE 1
#define UMFA_CLEAR_ROWS 2
#define UMFA_CLEAR_PARAMS 3
#define UMFA_CLEAR_BUFFERS 4

// Buffers of combine.metal.
#define UMFA_COMBINE_OUT_PARTIAL 0
#define UMFA_COMBINE_LSE_PARTIAL 1
#define UMFA_COMBINE_OUT 2
#define UMFA_COMBINE_LSE 3
#define UMFA_COMBINE_PARAMS 4
#define UMFA_COMBINE_BUFFERS 5

// Buffers of umfa_quantize of quantize.metal.
#define UMFA_QUANTIZE_X 0
#define UMFA_QUANTIZE_SCALES 1
#define UMFA_QUANTIZE_ZERO_POINTS 2
#define UMFA_QUANTIZE_DATA 3
#define UMFA_QUANTIZE_PARAMS 4
#define UMFA_QUANTIZE_BUFFERS 5

// Buffers of umfa_quantize_scales and umfa_quantize_gathered of quantize_scales.metal.
#define UMFA_QUANTIZE_SCALES_X 0  // not of the latter
#define UMFA_QUANTIZE_SCALES_RANGES 1
#define UMFA_QUANTIZE_SCALES_SCALES 2
#define UMFA_QUANTIZE_SCALES_ZERO_POINTS 3
#define UMFA_QUANTIZE_SCALES_FAULTS 4
#define UMFA_QUANTIZE_SCALES_PARAMS 5
#define UMFA_QUANTIZE_SCALES_BUFFERS 6

// Buffers of dequantize.metal.
#define UMFA_DEQUANTIZE_DATA 0
#define UMFA_DEQUANTIZE_SCALES 1
#define UMFA_DEQUANTIZE_OFFSETS 2
#define UMFA_DEQUANTIZE_OUT 3
#define UMFA_DEQUANTIZE_PARAMS 4
#define UMFA_DEQUANTIZE_BUFFERS 5

// Buffers of lanes.metal.
#define UMFA_LANES_MATRIX 0
#define UMFA_LANES_HELD 1
#define UMFA_LANES_PARAMS 2
#define UMFA_LANES_BUFFERS 3

// Buffers of umfa_dq and umfa_dkv of backward.metal.
#define UMFA_BACKWARD_QUERY 0
#define UMFA_BACKWARD_KEY 1
#define UMFA_BACKWARD_VALUE 2
#define UMFA_BACKWARD_DOUT 3
#define UMFA_BACKWARD_STATISTICS 4
#define UMFA_BACKWARD_MASK 5
#define UMFA_BACKWARD_SLOPES 6
#define UMFA_BACKWARD_SEQUENCES 7
#define UMFA_BACKWARD_TASKS 8
#define UMFA_BACKWARD_DQ 9
#define UMFA_BACKWARD_DK 10
#define UMFA_BACKWARD_DV 11
#define UMFA_BACKWARD_SLOPE_TERMS 12
#define UMFA_BACKWARD_ROTARY_COS 13
#define UMFA_BACKWARD_ROTARY_SIN 14
#define UMFA_BACKWARD_QV 15
#define UMFA_BACKWARD_DQV 16
#define UMFA_BACKWARD_PARAMS 17
#define UMFA_BACKWARD_BUFFERS 18

// Buffers of umfa_delta of backward.metal.
#define UMFA_DELTA_OUT 0
#define UMFA_DELTA_LSE 1
#define UMFA_DELTA_DOUT 2
#define UMFA_DELTA_DLSE 3
#define UMFA_DELTA_STATISTICS 4
#define UMFA_DELTA_PARAMS 5
#define UMFA_DELTA_BUFFERS 6

// Buffers of backward_mask.metal.
#define UMFA_DMASK_QUERY 0
#define UMFA_DMASK_KEY 1
#define UMFA_DMASK_VALUE 2
#define UMFA_DMASK_DOUT 3
#define UMFA_DMASK_STATISTICS 4
#define UMFA_DMASK_MASK 5
#define UMFA_DMASK_SLOPES 6
#define UMFA_DMASK_SEQUENCES 7
#define UMFA_DMASK_DMASK 8
#define UMFA_DMASK_ROTARY_COS 9
#define UMFA_DMASK_ROTARY_SIN 10
#define UMFA_DMASK_QV 11
#define UMFA_DMASK_PARAMS 12
#define UMFA_DMASK_BUFFERS 13

// Buffers of row_sums.metal.
#define UMFA_ROW_SUMS_ROWS 0
#define UMFA_ROW_SUMS_SINKS 1
#define UMFA_ROW_SUMS_SEQUENCES 2
#define UMFA_ROW_SUMS_SUMS 3
#define UMFA_ROW_SUMS_PARAMS 4
#define UMFA_ROW_SUMS_BUFFERS 5
