#include "core/parts.h"

#include <algorithm>
#include <cmath>

namespace umfa {

Operand operand_of(const TensorView& view, Layout layout) {
    Operand operand;
    operand.view = view;
    operand.stride_head = stride_at(view, head_of(layout));
    operand.stride_row = view.strides[view.ndim - row_of(layout)];
    operand.stride_channel = view.strides[view.ndim - 1];
    return operand;
}

Alibi checked_alibi(const Checker& check, const Problem& problem, const AttentionRequest& request) {
    const TensorView& slopes = *request.alibi_slopes;
    const std::string& name = (*request.function)[Field::alibi_slopes];
    const bool tables = request.has_tables();
    const bool per_head = slopes.ndim == 1 && slopes.shape[0] == problem.nheads_q;
    const int64_t batch = tables ? int64_t(problem.sequences.rows.size()) : problem.batch_shape[0];
    const bool per_batch = (problem.ndim == 4 || tables) && slopes.ndim == 2 &&
                           slopes.shape[0] == batch && slopes.shape[1] == problem.nheads_q;
    const std::string heads = std::to_string(problem.nheads_q);
    if (!per_head && !per_batch)
        check.value(name + " has the wrong shape", shape_text(slopes),
                    "(" + heads + ",) or (" + std::to_string(batch) + ", " + heads + ")");
    if (slopes.dtype != DType::f32)
        check.type(name + " has the wrong dtype", name_of(slopes.dtype), "float32");
    check_same_device(check, slopes, name, *request.query);
    check_memory(check, slopes, name);
    return {slopes, per_batch ? slopes.strides[0] : 0, slopes.strides[slopes.ndim - 1]};
}

Sinks checked_sinks(const Checker& check, const Problem& problem, const AttentionRequest& request) {
    const TensorView& sinks = *request.learnable_sink;
    const std::string& name = (*request.function)[Field::learnable_sink];
    if (sinks.ndim != 1 || sinks.shape[0] != problem.nheads_q)
        check.value(name + " has the wrong shape", shape_text(sinks),
                    "(" + std::to_string(problem.nheads_q) + ",)");
    check_float_dtype(check, sinks, name);
    check_same_device(check, sinks, name, *request.query);
    check_memory(check, sinks, name);
    return {sinks};
}

Operand checked_qv(const Checker& check, const Problem& problem, const AttentionRequest& request) {
    const TensorView& qv = *request.qv;
    const std::string& name = (*request.function)[Field::qv];
    TensorView shape = *request.query;
    shape.shape[shape.ndim - 1] = problem.head_dim_v;
    bool same = qv.ndim == shape.ndim;
    for (int i = 0; same && i < qv.ndim; ++i) same = qv.shape[i] == shape.shape[i];
    if (!same) check.value(name + " has the wrong shape", shape_text(qv), shape_text(shape));
    check_same_dtype(check, qv, name, *request.query, (*request.function)[Field::query]);
    check_same_device(check, qv, name, *request.query);
    check_memory(check, qv, name);
    return operand_of(qv, request.function->layout);
}

Dropout checked_dropout(const Checker& check, const AttentionRequest& request) {
    if (!(request.dropout_p >= 0 && request.dropout_p < 1))
        check.value((*request.function)[Field::dropout_p] + " is out of range",
                    text_of(request.dropout_p), "0 <= dropout_p < 1");
    Dropout dropout;
    dropout.p = request.dropout_p;
    dropout.key = dropout_key(request.dropout_seed.value_or(0), request.dropout_offset);
    dropout.threshold = static_cast<uint32_t>(std::min(request.dropout_p * 0x1p32, 0x1p32 - 1));
    return dropout;
}

DenseMask broadcast_mask(const Checker& check, const Problem& problem, const TensorView& mask) {
    const bool sequences = problem.sequences.given;
    const std::string& name = (*problem.names)[Field::attn_mask];
    TensorView full = mask;
    full.ndim = sequences ? 4 : problem.ndim;
    std::copy_n(problem.batch_shape, TensorView::max_ndim, full.shape);
    if (sequences) full.shape[0] = static_cast<int64_t>(problem.sequences.rows.size());
    if (full.ndim >= 3) full.shape[full.ndim - 3] = problem.nheads_q;
    full.shape[full.ndim - 2] = problem.seqlen_q;
    full.shape[full.ndim - 1] = problem.seqlen_kv;
    bool fits = mask.ndim <= full.ndim;
    // Of sequences, the mask may go on where the longest ends: as the cache does.
    for (int i = 1; fits && i <= full.ndim; ++i)
        fits = size_at(mask, i) == 1 || size_at(mask, i) == size_at(full, i) ||
               (sequences && i <= 2 && size_at(mask, i) > size_at(full, i));
    if (!fits)
        check.value(name + " has the wrong shape", shape_text(mask),
                    "a shape that broadcasts to " + shape_text(full) +
                        (sequences ? " (the longest sequences) or is longer" : ""));
    DenseMask found{mask, mask};
    found.view.ndim = 4;
    found.view.shape[1] = problem.nheads_q;
    found.view.shape[2] = problem.seqlen_q;
    found.view.shape[3] = problem.seqlen_kv;
    for (int i = 1; i <= 3; ++i) found.view.strides[4 - i] = stride_at(mask, i);
    if (mask.dtype != DType::b8 && !is_attention_dtype(mask.dtype)) {
        const std::string what = name + " has the wrong dtype",
                          expected = "bool, float32, float16 or bfloat16";
        if (is_other_float(mask.dtype)) check.unsupported(what, name_of(mask.dtype), expected);
        check.type(what, name_of(mask.dtype), expected);
    }
    check_same_device(check, mask, name, problem.query.view);
    check_memory(check, mask, name);
    return found;
}
std::optional<QuantOperand> checked_codes(const Checker& check, const AttentionRequest& request,
                                          Field field, const std::optional<QuantFormat>& format,
                                          TensorView& numbers) {
    const Function& names = *request.function;
    const bool is_key = field == Field::key;
    const auto& scales = is_key ? request.key_scales : request.value_scales;
    const auto& offsets = is_key ? request.key_offsets : request.value_offsets;
    numbers = is_key ? *request.key : *request.value;
    if (!format) {
        if (scales || offsets)
            check.value(names[field] + " has scales or zero points and no format", "a tensor",
                        "a format, or none of them");
        return {};
    }
    const char* refused = names.broadcasts            ? "a function whose tensors broadcast"
                          : request.new_key           ? "new keys for a quantised cache"
                          : request.return_attn_probs ? "the matrix of weights"
                                                      : nullptr;
    if (refused)
        check.unsupported("a quantised " + names[field] + " is not implemented here", refused,
                          "a call without, or a dequantised " + names[field]);
    const QuantOperand operand =
        QuantOperand::make(check, numbers, names[field], {*format, scales, offsets}, names.layout);
    numbers.shape[numbers.ndim - 1] = operand.sizes.channels;
    return operand;
}

Append checked_append(const Checker& check, const Problem& problem,
                      const AttentionRequest& request) {
    const TensorView &k = *request.new_key, &v = *request.new_value;
    const Function& names = *request.function;
    const struct {
        const TensorView &view, &cache;
        Field field, cache_field;
    } pairs[] = {{k, *request.key, Field::new_key, Field::key},
                 {v, *request.value, Field::new_value, Field::value}};
    const bool packed = request.cu_seqlens_k_new.has_value();
    // Of packed queries the table tells how many sequences there are: read_sequences() checks it.
    const int64_t batch = request.cu_seqlens_q && k.ndim == 4 ? k.shape[0] : problem.batch_shape[0];
    const int ndim = packed ? 3 : 4;
    for (const auto& [view, cache, field, cache_field] : pairs) {
        const std::string &name = names[field], &cache_name = names[cache_field];
        const std::string channels =
            std::to_string(problem.nheads_kv) + ", " + std::to_string(size_at(cache, 1)) + ")";
        const std::string rows = field == Field::new_value ? std::to_string(size_at(k, 3))
                                 : packed                  ? "total of the new rows"
                                                           : "new rows";
        if (view.ndim != ndim || (!packed && view.shape[0] != batch) ||
            size_at(view, 3) != size_at(k, 3) || size_at(view, 2) != problem.nheads_kv ||
            size_at(view, 1) != size_at(cache, 1))
            check.value(
                name + " has the wrong shape", shape_text(view),
                (packed ? "(" : "(" + std::to_string(batch) + ", ") + rows + ", " + channels);
        check_float_dtype(check, view, name);
        check_same_device(check, view, name, cache);
        check_memory(check, view, name);
        check_distinct(check, cache, cache_name);
        check_overlap(check, cache, cache_name, k, names[Field::new_key]);
        check_overlap(check, cache, cache_name, v, names[Field::new_value]);
        check_overlap(check, cache, cache_name, *request.query, names[Field::query]);
    }
    if (!interleaved(*request.key, *request.value))
        check_both_written(check, *request.key, names[Field::key], *request.value,
                           names[Field::value]);
    Append append{operand_of(k, Layout::bshd), operand_of(v, Layout::bshd)};
    append.key.stride_batch = stride_at(k, 4);
    append.value.stride_batch = stride_at(v, 4);
    return append;
}

Rotary checked_rotary(const Checker& check, const Problem& problem,
                      const AttentionRequest& request) {
    const std::string &cos_name = (*request.function)[Field::rotary_cos],
                      &sin_name = (*request.function)[Field::rotary_sin];
    if (!request.rotary_cos || !request.rotary_sin)
        check.value(cos_name + " and " + sin_name + " must be given together",
                    (request.rotary_cos ? cos_name : sin_name) + " alone", "both or neither");
    // New keys are rotated on their way into the cache, which holds the others rotated already.
    const bool keys = !request.new_key;
    const bool advances = keys || problem.causal || problem.visible.left != UMFA_UNBOUNDED ||
                          problem.visible.right != UMFA_UNBOUNDED || problem.visible.chunk > 0;
    Rotary rotary{
        *request.rotary_cos, *request.rotary_sin, 0, request.rotary_interleaved, advances, keys};
    int64_t positions = keys ? std::max(problem.seqlen_kv, problem.seqlen_q) : 0;
    for (const SequenceRows& rows : problem.sequences.rows) {
        const int64_t queries = advances ? rows.seqlen_q : std::min<int64_t>(rows.seqlen_q, 1);
        positions = std::max(positions, rows.position_q + std::max(queries, rows.new_rows));
    }
    if (positions > max_seqlen)
        check.unsupported(cos_name + " would be read too far", std::to_string(positions),
                          "at most " + std::to_string(max_seqlen) + " positions");
    const auto check_lengths = [&](int64_t seqlen_q, int64_t seqlen_kv) {
        if (keys && !problem.top_left && seqlen_q > seqlen_kv)
            check.value("seqlen_q must not exceed seqlen_kv with " + cos_name,
                        std::to_string(seqlen_q) + " and " + std::to_string(seqlen_kv),
                        "seqlen_q <= seqlen_kv: query i has position i + seqlen_kv - seqlen_q");
    };
    check_lengths(problem.seqlen_q, problem.seqlen_kv);
    for (const SequenceRows& rows : problem.sequences.rows)
        check_lengths(rows.seqlen_q, rows.seqlen_kv);
    const Function& names = *request.function;
    const struct {
        const TensorView& view;
        const std::string& name;
    } tables[] = {{rotary.cos, names[Field::rotary_cos]}, {rotary.sin, names[Field::rotary_sin]}};
    for (const auto& [view, name] : tables) {
        const bool fits = view.ndim == 2 && view.shape[1] >= 1 &&
                          view.shape[1] * 2 <= problem.head_dim &&
                          view.shape[1] == rotary.cos.shape[1];
        if (!fits)
            check.value(
                name + " has the wrong shape", shape_text(view),
                &view == &rotary.sin
                    ? "(positions, " + std::to_string(rotary.cos.shape[1]) + "), as " + cos_name
                    : "(positions, half of the rotated channels), at most " +
                          std::to_string(problem.head_dim / 2) + " of them");
        if (view.shape[0] < positions)
            check.value(name + " has too few positions", std::to_string(view.shape[0]),
                        "at least " + std::to_string(positions));
        check_float_dtype(check, view, name);
        check_same_dtype(check, view, name, rotary.cos, names[Field::rotary_cos]);
        check_same_device(check, view, name, *request.query);
        check_memory(check, view, name);
    }
    rotary.channels = rotary.cos.shape[1] * 2;
    return rotary;
}

}  // namespace umfa
