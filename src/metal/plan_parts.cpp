#include "metal/plan_parts.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <type_traits>

#include "core/constants.h"
#include "metal/plan_codes.h"

namespace umfa::metal {
namespace {

int kind_of(DType dtype) {
    switch (dtype) {
        case DType::b8: return UMFA_MASK_BOOL;
        case DType::f32: return UMFA_MASK_F32;
        case DType::f16: return UMFA_MASK_F16;
        default: return UMFA_MASK_BF16;
    }
}

/// Address of the first element, for alignment checks. A Metal buffer starts on a page, so its
/// offset is enough. Host memory is bound by whole pages, so its own address counts.
uint64_t start_of(const TensorView& view) {
    return view.device == Device::cpu ? reinterpret_cast<uint64_t>(view.address())
                                      : view.byte_offset;
}

/// Whether 32 bits hold the distance of any rows of a tile of keys or of a page, and of two pages
/// that follow each other.
bool near_rows(const Problem& problem) {
    constexpr int64_t limit = int64_t{1} << 31;
    constexpr int64_t tile = 128;  // no kernel has more keys on their way
    const int64_t rows = std::max(tile, problem.page_size);
    const auto is_near = [&](const Operand& operand) {
        return std::abs(operand.stride_row) < limit / rows &&
               (problem.page_size == 0 || std::abs(operand.stride_batch) < limit);
    };
    return is_near(problem.key) && is_near(problem.value);
}

/// Whether the scale waits for the exponent. A row's exponents then have one error in common, of 2^-24
/// of its largest score, which cancels out. In a row that is masked with float32's lowest number the
/// error would be 1e31; float16 cannot hold such numbers.
bool scales_last(const Problem& problem) {
    const bool small_mask = !problem.mask || problem.mask->view.dtype == DType::b8 ||
                            problem.mask->view.dtype == DType::f16;
    return small_mask && problem.softcap == 0 && !problem.alibi && problem.score_scale() >= 1e-30 &&
           problem.score_scale() <= 1;
}

bool shifts_pages(const Problem& problem) {
    return std::has_single_bit(static_cast<uint64_t>(problem.page_size));
}

bool has_prefix(const Problem& problem) {
    for (const SequenceRows& rows : problem.sequences.rows)
        if (rows.prefix > 0) return true;
    return false;
}

/// Whether keys can be rotated 32 bytes at a time, as rotary.h has it.
bool wide_rotary(const Problem& problem) {
    if (!problem.rotary || !problem.rotary->keys || problem.key_codes || !wide_loads(problem))
        return false;
    const Rotary& rotary = *problem.rotary;
    const auto is_wide = [&](const TensorView& table) {
        return table.dtype == DType::f32 &&
               rows_are_wide({table, 0, 0, table.strides[0], table.strides[1]},
                             rotary.channels / 2);
    };
    const int64_t elements = 32 / (bits_of(problem.key.view.dtype) / 8);
    return rotary.channels % elements == 0 && is_wide(rotary.cos) && is_wide(rotary.sin);
}

}  // namespace

bool has_aligned_runs(const TensorView& mask, int columns) {
    const int64_t bytes = std::min<int64_t>(bits_of(mask.dtype) / 8 * columns, 16);
    const auto whole = [&](int64_t value) { return value % columns == 0; };
    return mask.strides[3] == 1 && whole(mask.shape[3]) && whole(mask.strides[0]) &&
           whole(mask.strides[1]) && whole(mask.strides[2]) &&
           start_of(mask) % static_cast<uint64_t>(bytes) == 0;
}

ElementType element_type(DType dtype, const Capabilities& gpu) {
    switch (dtype) {
        case DType::f16: return {"half", "half", "f16", 2, 2};
        case DType::bf16:
            if (gpu.native_bfloat()) return {"bfloat", "bfloat", "bf16", 2, 2};
            return {"bfloat", "float", "bf16_as_f32", 4, 2};
        default: return {"float", "float", "f32", 4, 4};
    }
}

DType arithmetic_dtype(const Problem& problem) {
    const DType dtype = problem.query.view.dtype;
    const bool same = (problem.key_codes || problem.key.view.dtype == dtype) &&
                      (problem.value_codes || problem.value.view.dtype == dtype) &&
                      problem.out_dtype == dtype;
    return same ? dtype : DType::f32;
}

ElementType element_type(const Problem& problem, const Capabilities& gpu) {
    return element_type(arithmetic_dtype(problem), gpu);
}

int narrow_kind(DType dtype) { return dtype == DType::f32 ? UMFA_MASK_NONE : kind_of(dtype); }

ElementType stored_type(DType dtype) { return element_type(dtype, {Family::apple10}); }

std::vector<PlanTensor> input_tensors(const Problem& problem) {
    std::vector<PlanTensor> tensors;
    const auto add = [&](const char* name, const TensorView& view) -> PlanTensor& {
        return tensors.emplace_back(PlanTensor{name, view});
    };
    add("query", problem.query.view);
    const bool appends = problem.append.has_value();
    add("key", problem.key.view).written = appends;
    add("value", problem.value.view).written = appends;
    if (appends) {
        add("new_key", problem.append->key.view);
        add("new_value", problem.append->value.view);
    }
    if (problem.mask) add("attn_mask", problem.mask->given);
    add_code_tensors(tensors, problem);
    if (problem.alibi) add("alibi_slopes", problem.alibi->view);
    if (problem.sinks) add("learnable_sink", problem.sinks->logits);
    if (problem.qv) add("qv", problem.qv->view);
    if (problem.rotary) {
        add("rotary_cos", problem.rotary->cos);
        add("rotary_sin", problem.rotary->sin);
    }
    return tensors;
}

std::vector<PlanTensor> tensors_of(const Problem& problem, const ForwardResults& results) {
    std::vector<PlanTensor> tensors = input_tensors(problem);
    const auto add_result = [&](const char* name, const TensorView& view) {
        tensors.push_back({name, view, false, true});
    };
    add_result("out", results.out.view);
    if (results.lse) add_result("lse", results.lse->view);
    return tensors;
}

OperandStrides strides_of(const Operand& operand) {
    return {operand.stride_batch, operand.stride_head, operand.stride_row, operand.stride_channel};
}

RotaryParams rotary_params(const Problem& problem) {
    RotaryParams params{};
    if (!problem.rotary) return params;
    const Rotary& rotary = *problem.rotary;
    params.cos_position = rotary.cos.strides[0];
    params.cos_channel = rotary.cos.strides[1];
    params.sin_position = rotary.sin.strides[0];
    params.sin_channel = rotary.sin.strides[1];
    params.channels = static_cast<int32_t>(rotary.channels);
    params.advance = rotary.advances ? 1 : 0;
    return params;
}

DropoutParams dropout_params(const Problem& problem) {
    DropoutParams params{};
    params.factor = 1;
    if (!problem.dropout) return params;
    const Dropout& dropout = *problem.dropout;
    params.key_low = dropout.key.low;
    params.key_high = dropout.key.high;
    params.threshold = dropout.threshold;
    params.batch_first = static_cast<uint32_t>(dropout.batch_first);
    params.batch_step = static_cast<uint32_t>(dropout.batch_step);
    params.factor = static_cast<float>(1 / (1 - dropout.p));
    return params;
}

int32_t pages_param(const Problem& problem) {
    const auto size = static_cast<uint64_t>(problem.page_size);
    return static_cast<int32_t>(shifts_pages(problem) ? std::countr_zero(size) : problem.page_size);
}

ForwardParams forward_params(const Problem& problem, const ForwardResults& results) {
    ForwardParams params{};
    params.query = strides_of(problem.query);
    params.key = strides_of(problem.key);
    params.value = strides_of(problem.value);
    params.out = strides_of(results.out);
    if (results.lse) params.lse = strides_of(*results.lse);
    if (problem.mask) {
        const int64_t* strides = problem.mask->view.strides;
        params.mask_batch = strides[0];
        params.mask_head = strides[1];
        params.mask_row = strides[2];
        params.mask_column = strides[3];
    }
    if (problem.alibi) {
        params.slopes_batch = problem.alibi->stride_batch;
        params.slopes_head = problem.alibi->stride_head;
    }
    if (problem.sinks) params.sink = problem.sinks->logits.strides[0];
    if (problem.qv) params.qv = strides_of(*problem.qv);
    params.rotary = rotary_params(problem);
    params.dropout = dropout_params(problem);
    params.pages = pages_param(problem);
    params.seqlen_q = static_cast<int32_t>(problem.seqlen_q);
    params.head_dim = static_cast<int32_t>(problem.head_dim);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);
    params.group = static_cast<int32_t>(problem.nheads_q / problem.nheads_kv);
    params.visibility = narrowed(problem.visible);
    params.score_scale = static_cast<float>(problem.score_scale());
    params.mask_unit =
        static_cast<float>(log2_e / (scales_last(problem) ? problem.score_scale() : 1.0));
    params.softcap = static_cast<float>(problem.softcap_log2());
    return params;
}

bool rows_are_wide(const Operand& operand, int64_t channels) {
    const TensorView& view = operand.view;
    return channels * bits_of(view.dtype) % 128 == 0 && rows_are_aligned(operand, 16);
}

bool rows_are_aligned(const Operand& operand, int64_t bytes) {
    const TensorView& view = operand.view;
    const int64_t elements = bytes / (bits_of(view.dtype) / 8);
    return start_of(view) % static_cast<uint64_t>(bytes) == 0 && operand.stride_channel == 1 &&
           operand.stride_row % elements == 0 && operand.stride_head % elements == 0 &&
           operand.stride_batch % elements == 0;
}

bool wide_loads(const Problem& problem) {
    return (problem.key_codes || rows_are_wide(problem.key, problem.head_dim)) &&
           (problem.value_codes || rows_are_wide(problem.value, problem.head_dim_v));
}

bool has_dims(const Problem& problem, int d, int dv) {
    return problem.head_dim == d && problem.head_dim_v == dv;
}

#define UMFA_ELEMENT(INDEX, TYPE, NAME) \
    {INDEX, std::is_same_v<TYPE, bool> ? Constant::Type::boolean : Constant::Type::int32, #NAME, 0},
std::vector<Constant> zero_constants() { return {UMFA_CONSTANTS(UMFA_ELEMENT)}; }
#undef UMFA_ELEMENT

std::vector<Constant> constants_of(const Problem& problem, const ForwardResults& results) {
    std::vector<Constant> constants = zero_constants();
    const auto flag = [&](constant::Index index, bool value) {
        constants[index].value = value ? 1 : 0;
    };
    const auto kind = [&](constant::Index index, const TensorView* view) {
        constants[index].value = view ? kind_of(view->dtype) : UMFA_MASK_NONE;
    };
    const bool unit_channels = problem.query.stride_channel == 1 &&
                               results.out.stride_channel == 1 &&
                               (problem.key_codes || problem.key.stride_channel == 1) &&
                               (problem.value_codes || problem.value.stride_channel == 1) &&
                               (!problem.qv || problem.qv->stride_channel == 1);
    flag(constant::has_lse, results.lse.has_value());
    kind(constant::mask_kind, problem.mask ? &problem.mask->view : nullptr);
    flag(constant::has_mask, problem.mask.has_value());
    flag(constant::has_alibi, problem.alibi.has_value());
    flag(constant::has_softcap, problem.softcap > 0);
    flag(constant::scale_last, scales_last(problem));
    flag(constant::unit_channels, unit_channels);
    flag(constant::wide_loads, wide_loads(problem));
    flag(constant::has_chunk, problem.visible.chunk > 0);
    flag(constant::has_sequences, problem.sequences.given);
    flag(constant::has_device_tables, problem.sequences.tables.has_value());
    flag(constant::has_pages, problem.page_size > 0);
    flag(constant::has_sinks, problem.sinks.has_value());
    kind(constant::sink_kind, problem.sinks ? &problem.sinks->logits : nullptr);
    flag(constant::has_rotary, problem.rotary.has_value());
    flag(constant::rotates_keys, problem.rotary && problem.rotary->keys);
    flag(constant::rotary_interleaved, problem.rotary && problem.rotary->interleaved);
    kind(constant::rotary_kind, problem.rotary ? &problem.rotary->cos : nullptr);
    flag(constant::wide_rotary, wide_rotary(problem));
    flag(constant::has_dropout, problem.dropout.has_value());
    flag(constant::has_qv, problem.qv.has_value());
    flag(constant::has_prefix, has_prefix(problem));
    flag(constant::unit_mask, problem.mask && problem.mask->view.strides[3] == 1);
    flag(constant::shifts_pages, shifts_pages(problem));
    flag(constant::near_rows, near_rows(problem));
    flag(constant::wide_mask, problem.mask && has_aligned_runs(problem.mask->view, 2));
    set_code_constants(constants, problem);
    const bool narrows = arithmetic_dtype(problem) == DType::f32;
    const auto number_kind = [&](DType dtype) {
        return narrows ? narrow_kind(dtype) : UMFA_MASK_NONE;
    };
    constants[constant::query_kind].value = number_kind(problem.query.view.dtype);
    constants[constant::key_kind].value =
        problem.key_codes ? UMFA_KIND_CODES : number_kind(problem.key.view.dtype);
    constants[constant::value_kind].value =
        problem.value_codes ? UMFA_KIND_CODES : number_kind(problem.value.view.dtype);
    constants[constant::out_kind].value = number_kind(problem.out_dtype);
    return constants;
}

}  // namespace umfa::metal
