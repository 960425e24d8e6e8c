#include "metal/plan_codes.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <optional>
#include <string>

#include "metal/plan_parts.h"
#include "shared/code_kinds.h"

namespace umfa::metal {
namespace {

/// Whether lanes can read the codes of UMFA_CODE_RUN channels at once.
bool is_wide(const QuantOperand& operand) {
    const int bits = bits_of_codes(operand.format.codes());
    return operand.scales && operand.sizes.channels % UMFA_CODE_RUN == 0 &&
           rows_are_aligned(operand.data, UMFA_CODE_RUN * bits / 8);
}

/// Whether 31 bits count the elements from any scale or offset of a head to any other, or of a page.
bool is_near(const QuantOperand& operand) {
    const QuantSizes& sizes = operand.sizes;
    const auto reaches = [&](const std::optional<Operand>& part) {
        if (!part) return true;
        constexpr int64_t limit = int64_t{1} << 31;
        const int64_t rows = std::max<int64_t>(1, sizes.row_blocks()),
                      channels = std::max<int64_t>(1, sizes.channel_blocks());
        const int64_t row = std::abs(part->stride_row), channel = std::abs(part->stride_channel);
        return row <= limit / rows / 2 && channel <= limit / channels / 2;
    };
    return reaches(operand.scales) && reaches(operand.offsets);
}

/// The value of key_codes or value_codes.
int kind_of(const std::optional<QuantOperand>& operand) {
    if (!operand) return 0;
    const QuantSizes& sizes = operand->sizes;
    const bool several = sizes.channel_blocks() > 1;
    CodeKind kind{};
    kind.codes = operand->format.codes();
    kind.scales = operand->format.scale_kind();
    kind.offset = operand->format.offset_kind();
    kind.wide = is_wide(*operand);
    kind.row_blocks = sizes.row_blocks() > 1 && sizes.block_rows > 1;
    kind.channel_blocks = several && sizes.block_channels > 1;
    kind.each = several && sizes.block_channels == 1;
    kind.near = is_near(*operand);
    const auto channels = static_cast<uint64_t>(sizes.block_channels);
    if (kind.channel_blocks && std::has_single_bit(channels))
        kind.shift = std::countr_zero(channels);
    return packed_kind(kind);
}

CodesParams params_of(const std::optional<QuantOperand>& operand) {
    CodesParams params{};
    if (!operand) return params;
    const QuantSizes& sizes = operand->sizes;
    if (operand->scales) params.scales = strides_of(*operand->scales);
    if (operand->offsets) params.offsets = strides_of(*operand->offsets);
    // Blocks may be longer than the tensor.
    params.block_rows =
        static_cast<int32_t>(std::min(sizes.block_rows, std::max<int64_t>(1, sizes.rows)));
    params.block_channels = static_cast<int32_t>(sizes.block_channels);
    return params;
}

}  // namespace

Verdict can_plan_codes(const Problem& problem) {
    for (const auto* codes : {&problem.key_codes, &problem.value_codes})
        if (*codes && (*codes)->sizes.rows > max_seqlen)
            return {false, "more than " + std::to_string(max_seqlen) +
                               " rows of a quantised tensor are not implemented"};
    return {};
}

void add_code_tensors(std::vector<PlanTensor>& tensors, const Problem& problem) {
    const auto add = [&](const char* name, const std::optional<Operand>& part) {
        if (part) tensors.push_back({name, part->view});
    };
    if (problem.key_codes) {
        add("key_scales", problem.key_codes->scales);
        add("key_offsets", problem.key_codes->offsets);
    }
    if (problem.value_codes) {
        add("value_scales", problem.value_codes->scales);
        add("value_offsets", problem.value_codes->offsets);
    }
}

void set_code_constants(std::vector<Constant>& constants, const Problem& problem) {
    const auto &key = problem.key_codes, &value = problem.value_codes;
    constants[constant::key_codes].value = kind_of(key);
    constants[constant::value_codes].value = kind_of(value);
    constants[constant::has_codes].value = key || value;
    constants[constant::has_key_scales].value = key && key->scales;
    constants[constant::has_key_offsets].value = key && key->offsets;
    constants[constant::has_value_scales].value = value && value->scales;
    constants[constant::has_value_offsets].value = value && value->offsets;
}

void bind_codes(LaunchBuilder& launch, const Problem& problem, const CodeSlots& slots) {
    if (!problem.key_codes && !problem.value_codes) return;
    launch.tensor({slots.key_scales, "key_scales"})
        .tensor({slots.key_offsets, "key_offsets"})
        .tensor({slots.value_scales, "value_scales"})
        .tensor({slots.value_offsets, "value_offsets"})
        .new_data(slots.params, std::vector<ForwardCodes>{{params_of(problem.key_codes),
                                                           params_of(problem.value_codes)}});
}

bool decodes_codes(const Problem& problem) {
    for (const auto* codes : {&problem.key_codes, &problem.value_codes}) {
        if (!*codes) continue;
        const CodeKind kind = unpacked_kind(kind_of(*codes));
        if (!kind.wide || kind.each) return false;
    }
    return true;
}

}  // namespace umfa::metal
