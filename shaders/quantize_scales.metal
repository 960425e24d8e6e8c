// Scales and zero points of a tensor that is to be quantised.
#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/indices.h"
#include "shared/params.h"
#include "shared/quant_format.h"
#include "shared/quant_parts.h"

using namespace metal;
using namespace umfa;

namespace umfa {

inline QuantRange empty_range() {
    QuantRange range;
    range.magnitude = 0u;
    range.low = 0.0f;
    range.high = 0.0f;
    return range;
}

inline void widen(thread QuantRange& range, QuantRange by) {
    range.magnitude = max(range.magnitude, by.magnitude);
    range.low = min(range.low, by.low);
    range.high = max(range.high, by.high);
}

inline void widen(thread QuantRange& range, float x) {
    QuantRange by;
    by.magnitude = as_type<uint>(x) & 0x7fffffffu;
    by.low = x;
    by.high = x;
    widen(range, by);
}

/// The range of what all lanes have.
inline QuantRange of_all_lanes(QuantRange range) {
    range.magnitude = simd_max(range.magnitude);
    range.low = -simd_max(-range.low);
    range.high = simd_max(range.high);
    return range;
}

/// Writes the scale of a block, and its zero point. `block`: its number among all.
inline void finish(QuantRange range, int64_t block, device uchar* scales, device uchar* zero_points,
                   device uchar* faults, constant QuantizeParams& params) {
    const uint bits = quant_scale_bits(code_kind, scale_kind, range);
    const bool poison = is_poison(scale_kind, bits);
    const int channel_block = int(block % params.channel_blocks);
    const int64_t of_rows = block / params.channel_blocks;
    const int row_block = int(of_rows % params.row_blocks);
    const int64_t of_heads = of_rows / params.row_blocks;
    const int head = int(of_heads % params.heads);
    const int64_t batch = of_heads / params.heads;
    store_bits(
        scales, scale_kind,
        offset_to(params.scales, batch, head, row_block) + channel_block * params.scales.channel,
        bits);
    if (has_offsets) {
        QuantScale scale;
        scale.value = quant_scale(scale_kind, bits);
        scale.inverse = 1.0f / scale.value;
        const bool has_step = !poison && bits != 0u;
        const int zero = has_step ? quant_zero(code_kind, range.low, scale) : 0;
        zero_points[offset_to(params.zero_points, batch, head, row_block) +
                    channel_block * params.zero_points.channel] = uchar(zero);
    }
    if (has_faults) {
        const bool finite = range.magnitude < 0x7f800000u;
        faults[block] = uchar(!poison ? 0 : finite ? UMFA_FAULT_TOO_LARGE : UMFA_FAULT_NONFINITE);
    }
}

}  // namespace umfa

/// Each simdgroup finds the range of a piece: some rows of a block. Where blocks are one channel wide,
/// each lane has a block of its own, so that lanes read neighbours. Without has_ranges a block is one
/// piece, and gets its scale here.
template <typename T>
[[kernel]] void umfa_quantize_scales(
    device const T* x [[buffer(UMFA_QUANTIZE_SCALES_X)]],
    device QuantRange* ranges UMFA_BUFFER_IF(UMFA_QUANTIZE_SCALES_RANGES, has_ranges),
    device uchar* scales UMFA_BUFFER_IF(UMFA_QUANTIZE_SCALES_SCALES, has_scales),
    device uchar* zero_points UMFA_BUFFER_IF(UMFA_QUANTIZE_SCALES_ZERO_POINTS, has_offsets),
    device uchar* faults UMFA_BUFFER_IF(UMFA_QUANTIZE_SCALES_FAULTS, has_faults),
    constant QuantizeParams& params [[buffer(UMFA_QUANTIZE_SCALES_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    const int index = group.x * (threads.x / 32) + simdgroup;
    if (index >= params.row_blocks * params.pieces) return;
    const int row_block = index / params.pieces, piece = index % params.pieces;
    const int rows = params.blocks.rows, channels = params.blocks.channels;
    const int block_begin = row_block * params.blocks.block_rows;
    const int block_rows = min(params.blocks.block_rows, rows - block_begin);
    const int of_block = piece * params.piece_rows, first = block_begin + of_block;
    const int count = min(params.piece_rows, block_rows - of_block);
    const int64_t head_index = group.z;
    x += offset_to(params.x, head_index / params.heads, int(head_index % params.heads), first);

    const bool by_lane = params.blocks.block_channels == 1;
    const int channel_block = by_lane ? int(group.y) * 32 + int(lane) : int(group.y);
    const int begin = channel_block * params.blocks.block_channels;
    const int width = min(params.blocks.block_channels, channels - begin);
    QuantRange range = empty_range();
    if (by_lane) {
        for (int row = 0; row < count && width == 1; ++row)
            widen(range,
                  without_minus_zero(float(x[row * params.x.row + begin * params.x.channel])));
    } else {
        for (int i = lane; i < count * width; i += 32) {
            const int row = i / width, c = begin + i % width;
            widen(range, without_minus_zero(float(x[row * params.x.row + c * params.x.channel])));
        }
        range = of_all_lanes(range);
    }
    if (by_lane ? width < 1 : lane != 0u) return;
    const int64_t block =
        (head_index * params.row_blocks + row_block) * params.channel_blocks + channel_block;
    if (has_ranges)
        ranges[block * params.pieces + piece] = range;
    else
        finish(range, block, scales, zero_points, faults, params);
}

/// Each simdgroup finishes a block of several pieces. T: of the tensor, since the self-test trusts
/// kernels dtype by dtype.
template <typename T>
[[kernel]] void umfa_quantize_gathered(
    device const QuantRange* ranges [[buffer(UMFA_QUANTIZE_SCALES_RANGES)]],
    device uchar* scales [[buffer(UMFA_QUANTIZE_SCALES_SCALES)]],
    device uchar* zero_points UMFA_BUFFER_IF(UMFA_QUANTIZE_SCALES_ZERO_POINTS, has_offsets),
    device uchar* faults UMFA_BUFFER_IF(UMFA_QUANTIZE_SCALES_FAULTS, has_faults),
    constant QuantizeParams& params [[buffer(UMFA_QUANTIZE_SCALES_PARAMS)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 threads [[threads_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    const int64_t block = int64_t(group.x) * (threads.x / 32) + simdgroup;
    if (block >= params.block_count) return;
    QuantRange range = empty_range();
    for (int piece = lane; piece < params.gathered; piece += 32)
        widen(range, ranges[block * params.gathered + piece]);
    range = of_all_lanes(range);
    if (lane == 0u) finish(range, block, scales, zero_points, faults, params);
}

#define UMFA_QUANTIZE(FUNCTION, NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(FUNCTION<TYPE>) FUNCTION<TYPE>;

#ifdef UMFA_KERNEL
UMFA_QUANTIZE(UMFA_OF, UMFA_KERNEL, UMFA_T)
#else
UMFA_QUANTIZE(umfa_quantize_scales, "quantize_scales_f16", half)
UMFA_QUANTIZE(umfa_quantize_scales, "quantize_scales_bf16", bfloat)
UMFA_QUANTIZE(umfa_quantize_scales, "quantize_scales_f32", float)
UMFA_QUANTIZE(umfa_quantize_gathered, "quantize_gathered_f16", half)
UMFA_QUANTIZE(umfa_quantize_gathered, "quantize_gathered_bf16", bfloat)
UMFA_QUANTIZE(umfa_quantize_gathered, "quantize_gathered_f32", float)
#endif
