#include "cpu/arguments.h"

namespace umfa::cpu {

Rows rows_of(const Operand& operand) {
    return {operand.view.size() ? operand.view.address() : nullptr, operand.stride_batch,
            operand.stride_head, operand.stride_row, operand.stride_channel};
}

float float_at(const char* data, int64_t element, DType dtype) {
    if (dtype == DType::f32) return reinterpret_cast<const float*>(data)[element];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[element];
    return dtype == DType::f16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

ElementType element_of(DType dtype) {
    switch (dtype) {
        case DType::b8: return ElementType::boolean;
        case DType::f16: return ElementType::f16;
        case DType::bf16: return ElementType::bf16;
        default: return ElementType::f32;
    }
}

Mask mask_of(const DenseMask& mask) {
    const int64_t* strides = mask.view.strides;
    return {mask.view.size() ? mask.view.address() : nullptr,
            strides[0],
            strides[1],
            strides[2],
            strides[3],
            element_of(mask.view.dtype)};
}

Rotary rotary_of(const umfa::Rotary& rotary) {
    return {rotary.cos.address(),
            rotary.sin.address(),
            rotary.cos.strides[0],
            rotary.cos.strides[1],
            rotary.sin.strides[0],
            rotary.sin.strides[1],
            element_of(rotary.cos.dtype),
            rotary.channels,
            rotary.interleaved,
            rotary.advances,
            rotary.keys};
}

Codes codes_of(const QuantOperand& operand) {
    const auto strides = [](const Operand& part) -> Codes::Strides {
        const int64_t bytes = bits_of(part.view.dtype) / 8;
        return {part.stride_batch * bytes, part.stride_head * bytes, part.stride_row * bytes,
                part.stride_channel * bytes};
    };
    const auto address = [](const Operand& part) {
        return part.view.size() ? part.view.address() : nullptr;
    };
    const QuantSizes& sizes = operand.sizes;
    Codes codes{};
    codes.given = true;
    codes.codes = operand.format.codes();
    codes.scale_kind = operand.format.scale_kind();
    codes.offset_kind = operand.format.offset_kind();
    codes.block_rows = sizes.block_rows;
    codes.block_channels = sizes.block_channels;
    if (operand.scales) {
        codes.scales = address(*operand.scales);
        codes.scale_strides = strides(*operand.scales);
    }
    if (operand.offsets) {
        codes.offsets = address(*operand.offsets);
        codes.offset_strides = strides(*operand.offsets);
    }
    return codes;
}

std::vector<Sequence> sequences_of(const Problem& problem) {
    std::vector<Sequence> sequences(static_cast<size_t>(problem.batch));
    for (int64_t b = 0; b < problem.batch; ++b) {
        const SequenceRows rows = problem.sequence(b);
        const int32_t* pages = problem.page_size > 0 ? problem.sequences.pages.data() +
                                                           b * problem.sequences.pages_per_sequence
                                                     : nullptr;
        sequences[static_cast<size_t>(b)] = {rows.query_batch,
                                             rows.query_row,
                                             rows.kv_batch,
                                             rows.kv_row,
                                             rows.seqlen_q,
                                             rows.seqlen_kv,
                                             problem.visible_of(rows),
                                             rows.position_q,
                                             pages,
                                             rows.new_batch,
                                             rows.new_row,
                                             rows.new_rows};
    }
    return sequences;
}

}  // namespace umfa::cpu
