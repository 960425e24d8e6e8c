// Numbers of a quantised tensor.
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/indices.h"
#include "shared/params.h"
#include "shared/quant_format.h"
#include "shared/quant_parts.h"

using namespace metal;
using namespace umfa;

/// Each simdgroup writes one row.
template <typename T>
[[kernel]] void umfa_dequantize(
    device const uchar* data [[buffer(UMFA_DEQUANTIZE_DATA)]],
    device const uchar* scales UMFA_BUFFER_IF(UMFA_DEQUANTIZE_SCALES, has_scales),
    device const uchar* offsets UMFA_BUFFER_IF(UMFA_DEQUANTIZE_OFFSETS, has_offsets),
    device T* out [[buffer(UMFA_DEQUANTIZE_OUT)]],
    constant DequantizeParams& params [[buffer(UMFA_DEQUANTIZE_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    const int row = group.x * (threads.x / 32) + simdgroup, head = group.y;
    if (row >= params.blocks.rows) return;
    const int64_t batch = group.z;
    data += offset_to(params.data, batch, head, row);
    out += offset_to(params.out, batch, head, row);
    const int row_block = row / params.blocks.block_rows;
    const int64_t row_scales = offset_to(params.scales, batch, head, row_block);
    const int64_t row_offsets = offset_to(params.offsets, batch, head, row_block);
    for (int c = lane; c < params.blocks.channels; c += 32) {
        const int block = c / params.blocks.block_channels;
        const QuantPlace<int> place = quant_place(code_kind, scale_kind, c);
        const uint code = uint(data[place.byte]) >> place.shift & code_mask();
        uint scale_bits = 0u;
        if (has_scales) {
            scale_bits =
                stored_bits(scales, scale_kind, row_scales + block * params.scales.channel);
        } else {
            // In front of the codes of its block, at any address.
            const int at =
                c / UMFA_GGUF_BLOCK * quant_row_bytes(code_kind, scale_kind, UMFA_GGUF_BLOCK);
            scale_bits = uint(data[at]) | uint(data[at + 1]) << 8;
        }
        float offset = 0.0f;
        if (has_offsets) {
            const int64_t at = row_offsets + block * params.offsets.channel;
            offset = offset_kind == UMFA_OFFSET_BIAS
                         ? quant_scale(scale_kind, stored_bits(offsets, scale_kind, at))
                         : float(offsets[at]);
        }
        const float number = quant_number(code_kind, code);
        out[c * params.out.channel] =
            T(dequantized(offset_kind, number, quant_scale(scale_kind, scale_bits), offset));
    }
}

#define UMFA_DEQUANTIZE(NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_dequantize<TYPE>) umfa_dequantize<TYPE>;

#ifdef UMFA_KERNEL
UMFA_DEQUANTIZE(UMFA_KERNEL, UMFA_T)
#else
UMFA_DEQUANTIZE("dequantize_f16", half)
UMFA_DEQUANTIZE("dequantize_bf16", bfloat)
UMFA_DEQUANTIZE("dequantize_f32", float)
#endif
