// Codes of a tensor whose scales are known.
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/indices.h"
#include "shared/params.h"
#include "shared/quant_format.h"
#include "shared/quant_parts.h"

using namespace metal;
using namespace umfa;

/// Each simdgroup writes one row of codes. Its lanes write whole bytes, so that two codes that share
/// one need no order.
template <typename T>
[[kernel]] void umfa_quantize(
    device const T* x [[buffer(UMFA_QUANTIZE_X)]],
    device const uchar* scales [[buffer(UMFA_QUANTIZE_SCALES)]],
    device const uchar* zero_points UMFA_BUFFER_IF(UMFA_QUANTIZE_ZERO_POINTS, has_offsets),
    device uchar* data [[buffer(UMFA_QUANTIZE_DATA)]],
    constant QuantizeParams& params [[buffer(UMFA_QUANTIZE_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    const int row = group.x * (threads.x / 32) + simdgroup, head = group.y;
    if (row >= params.blocks.rows) return;
    const int64_t batch = group.z;
    const int channels = params.blocks.channels, row_block = row / params.blocks.block_rows;
    const int64_t row_scales = offset_to(params.scales, batch, head, row_block);
    const int64_t row_zeros = offset_to(params.zero_points, batch, head, row_block);
    x += offset_to(params.x, batch, head, row);
    data += offset_to(params.data, batch, head, row);
    const int bits = bits_of_codes(code_kind), of_byte = 8 / bits;
    const int bytes = quant_row_bytes(code_kind, scale_kind, channels);
    for (int byte = lane; byte < bytes; byte += 32) {
        uint codes = 0u;
        for (int i = 0; i < of_byte; ++i) {
            const int c = byte * of_byte + i;
            if (c >= channels) continue;
            const int block = c / params.blocks.block_channels;
            const uint stored =
                stored_bits(scales, scale_kind, row_scales + block * params.scales.channel);
            if (is_poison(scale_kind, stored)) continue;
            QuantScale scale;
            scale.value = quant_scale(scale_kind, stored);
            // Correctly rounded: kernels are compiled without fast mathematics.
            scale.inverse = scale.value == 0.0f ? 0.0f : 1.0f / scale.value;
            int zero = 0;
            if (has_offsets) zero = zero_points[row_zeros + block * params.zero_points.channel];
            const float number = without_minus_zero(float(x[c * params.x.channel]));
            codes |= quant_code(code_kind, number, scale, zero) << (i * bits);
        }
        data[byte] = uchar(codes);
    }
}

#define UMFA_QUANTIZE(NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_quantize<TYPE>) umfa_quantize<TYPE>;

#ifdef UMFA_KERNEL
UMFA_QUANTIZE(UMFA_KERNEL, UMFA_T)
#else
UMFA_QUANTIZE("quantize_f16", half)
UMFA_QUANTIZE("quantize_bf16", bfloat)
UMFA_QUANTIZE("quantize_f32", float)
#endif
