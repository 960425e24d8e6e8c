#include "core/problem.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/parts.h"

namespace umfa {
namespace {

std::string dims_text(Layout layout, bool broadcasts) {
    if (broadcasts) return "at least 2: (..., nheads, seqlen, head_dim)";
    return layout == Layout::bshd ? "4: (batch, seqlen, nheads, head_dim)"
                                  : "4: (batch, nheads, seqlen, head_dim)";
}

/// That what is written lies in none of the tensors of the orthogonal parts.
void check_apart_from_parts(const Checker& check, const Problem& problem, const TensorView& view,
                            const std::string& name) {
    if (problem.alibi) check_overlap(check, view, name, problem.alibi->view, "alibi_slopes");
    if (problem.mask) check_overlap(check, view, name, problem.mask->given, "attn_mask");
    if (problem.sinks) check_overlap(check, view, name, problem.sinks->logits, "learnable_sink");
    if (problem.qv) check_overlap(check, view, name, problem.qv->view, "qv");
    if (problem.rotary) {
        check_overlap(check, view, name, problem.rotary->cos, "rotary_cos");
        check_overlap(check, view, name, problem.rotary->sin, "rotary_sin");
    }
}

void check_writable(const Checker& check, const Problem& problem, const TensorView& view,
                    const TensorView& shape, const std::string& name) {
    bool same = view.ndim == shape.ndim;
    for (int i = 0; same && i < view.ndim; ++i) same = view.shape[i] == shape.shape[i];
    if (!same) check.value(name + " has the wrong shape", shape_text(view), shape_text(shape));
    if (view.dtype != shape.dtype)
        check.type(name + " has the wrong dtype", name_of(view.dtype), name_of(shape.dtype));
    check_same_device(check, view, name, shape);
    check_memory(check, view, name);
    check_distinct(check, view, name);
    check_overlap(check, view, name, problem.query.view, std::string(problem.query_name));
    check_overlap(check, view, name, problem.key.view, std::string(problem.key_name));
    check_overlap(check, view, name, problem.value.view, std::string(problem.value_name));
    check_apart_from_parts(check, problem, view, name);
    if (problem.append) {
        check_overlap(check, view, name, problem.append->key.view, "k");
        check_overlap(check, view, name, problem.append->value.view, "v");
    }
}

void check_window(const Checker& check, const char* side, int64_t width) {
    if (width < -1 || width > max_seqlen)
        check.value(std::string("window_size ") + side + " is out of range", std::to_string(width),
                    "-1 (unbounded) or 0 to " + std::to_string(max_seqlen));
}

}  // namespace

const char* name_of(Feature feature) {
    switch (feature) {
        case Feature::causal: return "causal";
        case Feature::window: return "window_size";
        case Feature::softcap: return "softcap";
        case Feature::alibi: return "alibi_slopes";
        case Feature::lse: return "softmax_lse";
        case Feature::gqa: return "grouped-query attention";
        case Feature::mask: return "attn_mask";
        case Feature::sinks: return "learnable_sink";
        case Feature::block_mask: return "block_mask";
        case Feature::score_program: return "score_mod";
        case Feature::varlen: return "a table of sequences (cu_seqlens, cache_seqlens)";
        case Feature::paged_kv: return "block_table";
        case Feature::dropout: return "dropout_p";
        case Feature::quantised: return "quantised operands";
        case Feature::attention_chunk: return "attention_chunk";
        case Feature::append: return "appending to the cache";
        case Feature::rotary: return "rotary_cos";
        case Feature::qv: return "qv";
    }
    return "unknown";
}

Problem Problem::make(const AttentionRequest& request) {
    const Checker check{request.function};
    Problem problem;
    problem.function = request.function;
    problem.query_name = request.query_name;
    problem.key_name = request.key_name;
    problem.value_name = request.value_name;
    problem.layout = request.layout;

    // Each tensor on its own.
    const std::string q_name(request.query_name), k_name(request.key_name),
        v_name(request.value_name);
    const struct {
        const TensorView& view;
        const std::string& name;
    } inputs[] = {{request.query, q_name}, {request.key, k_name}, {request.value, v_name}};
    const SequenceTables& tables = request.tables;
    for (const auto& [view, name] : inputs) {
        const bool packed = &view == &request.query ? tables.cu_seqlens_q.has_value()
                                                    : tables.cu_seqlens_k && !tables.block_table;
        if (request.broadcasts ? view.ndim < 2 : view.ndim != (packed ? 3 : 4))
            check.value(name + " has " + std::to_string(view.ndim) + " dimensions",
                        "shape " + shape_text(view),
                        packed ? "3: (total, nheads, head_dim)"
                               : dims_text(request.layout, request.broadcasts));
        check_float_dtype(check, view, name);
        check_memory(check, view, name);
    }

    // The three together.
    const TensorView &q = request.query, &k = request.key, &v = request.value;
    for (const auto& [view, name] : inputs) {
        check_same_dtype(check, view, name, q, q_name);
        if (view.device != q.device || view.device_id != q.device_id)
            check.value("device differs: " + q_name + " is on " + device_text(q) + ", " + name +
                            " on " + device_text(view),
                        device_text(view), device_text(q));
    }
    const int row = row_of(request.layout), head = head_of(request.layout);
    const auto differ = [&](const std::string& what, const TensorView& a, const std::string& a_name,
                            const TensorView& b, const std::string& b_name, int dimension,
                            const std::string& expected) {
        check.value(what + " differs: " + a_name + " has " + std::to_string(size_at(a, dimension)) +
                        ", " + b_name + " has " + std::to_string(size_at(b, dimension)),
                    q_name + " " + shape_text(q) + ", " + k_name + " " + shape_text(k) + ", " +
                        v_name + " " + shape_text(v),
                    expected);
    };
    const auto same = [&](const char* what, const TensorView& a, const std::string& a_name,
                          const TensorView& b, const std::string& b_name, int dimension) {
        if (size_at(a, dimension) != size_at(b, dimension))
            differ(what, a, a_name, b, b_name, dimension, std::string("equal ") + what);
    };
    // The size that all of a dimension broadcast to.
    const auto broadcast = [&](const char* what, int dimension, const char* expected) {
        int64_t size = 1;
        const TensorView* first = nullptr;
        const std::string* first_name = nullptr;
        for (const auto& [view, name] : inputs) {
            const int64_t own = size_at(view, dimension);
            if (own == 1) continue;
            if (first && own != size)
                differ(what, *first, *first_name, view, name, dimension, expected);
            first = &view;
            first_name = &name;
            size = own;
        }
        return size;
    };
    problem.ndim = request.broadcasts ? std::max({q.ndim, k.ndim, v.ndim}) : q.ndim;
    if (!request.broadcasts) {
        if (!tables.any()) same("batch", q, q_name, k, k_name, 4);
        same("batch", k, k_name, v, v_name, 4);
        problem.batch_shape[0] = size_at(q, 4);
    }
    for (int i = 0; request.broadcasts && i < problem.ndim - 3; ++i)
        problem.batch_shape[i] = broadcast("batch", problem.ndim - i, "equal batch sizes, or 1");
    same("head_dim", q, q_name, k, k_name, 1);
    if (!request.broadcasts) same("nheads", k, k_name, v, v_name, head);
    same("seqlen", k, k_name, v, v_name, row);

    problem.nheads_q = size_at(q, head);
    problem.nheads_kv = size_at(k, head);
    if (request.broadcasts && !request.grouped) {
        problem.nheads_q =
            broadcast("nheads", head, "equal nheads, or 1; enable_gqa=True lets heads share keys");
        // One key head for all is read as a group, where both have but one.
        if (size_at(k, head) != 1 || size_at(v, head) != 1) problem.nheads_kv = problem.nheads_q;
    } else if (request.broadcasts) {
        problem.nheads_kv = std::max(problem.nheads_kv, size_at(v, head));
        if (size_at(k, head) == 0 || size_at(v, head) == 0) problem.nheads_kv = 0;
        for (const TensorView* view : {&k, &v})
            if (size_at(*view, head) != 1 && size_at(*view, head) != problem.nheads_kv)
                same("nheads", k, k_name, v, v_name, head);
    }
    problem.query_rows = size_at(q, row);
    problem.seqlen_q = problem.query_rows;
    problem.seqlen_kv = size_at(k, row);
    problem.head_dim = size_at(q, 1);
    problem.head_dim_v = size_at(v, 1);
    const auto check_head_dim = [&](int64_t size, int64_t most, const std::string& name) {
        const auto expected = [&] { return "1 to " + std::to_string(most); };
        if (size < 1)
            check.value("head_dim of " + name + " is too small", std::to_string(size), expected());
        if (size > most)
            check.unsupported("head_dim of " + name + " is too large", std::to_string(size),
                              expected());
    };
    check_head_dim(problem.head_dim, max_head_dim, q_name);
    check_head_dim(problem.head_dim_v, max_head_dim_v, v_name);
    for (const auto& [length, name] :
         {std::pair{problem.seqlen_q, q_name}, {problem.seqlen_kv, k_name}})
        if (length > max_seqlen)
            check.unsupported("seqlen of " + name + " is too large", std::to_string(length),
                              "at most " + std::to_string(max_seqlen));
    if (request.new_key.has_value() != request.new_value.has_value())
        check.value("k and v must be given together", request.new_key ? "k alone" : "v alone",
                    "both or neither");
    if (request.new_key) problem.append = checked_append(check, problem, request);
    if (tables.any() || problem.append) {
        problem.sequences =
            read_sequences(request.function, tables,
                           {problem.batch_shape[0], problem.query_rows, size_at(k, 4),
                            size_at(k, row), problem.append ? problem.append->rows : 0});
        problem.page_size = tables.block_table ? size_at(k, row) : 0;
        problem.seqlen_q = problem.seqlen_kv = 0;
        for (const SequenceRows& rows : problem.sequences.rows) {
            problem.seqlen_q = std::max(problem.seqlen_q, rows.seqlen_q);
            problem.seqlen_kv = std::max(problem.seqlen_kv, rows.seqlen_kv);
        }
    }
    const bool divides =
        problem.nheads_kv > 0 ? problem.nheads_q % problem.nheads_kv == 0 : problem.nheads_q == 0;
    if (!divides)  // where nheads broadcasts, it does
        check.value("nheads of " + q_name + " is not a multiple of nheads of " + k_name,
                    std::to_string(problem.nheads_q) + " and " + std::to_string(problem.nheads_kv),
                    "nheads_q % nheads_kv == 0");
    // Expanded tensors that broadcast can ask for more than there are addresses.
    int64_t elements = problem.nheads_q;
    bool fits = !__builtin_mul_overflow(elements, problem.seqlen_q, &elements) &&
                !__builtin_mul_overflow(elements, problem.head_dim_v, &elements);
    for (int i = 0; i < problem.ndim - 3; ++i)
        fits = fits && !__builtin_mul_overflow(elements, problem.batch_shape[i], &elements);
    if (!fits)
        check.value("the result is too large",
                    q_name + " " + shape_text(q) + ", " + k_name + " " + shape_text(k) + ", " +
                        v_name + " " + shape_text(v),
                    "less than 2^63 elements");
    problem.query = operand_of(q, request.layout);
    problem.key = operand_of(k, request.layout);
    problem.value = operand_of(v, request.layout);
    if (request.qv) problem.qv = checked_qv(check, problem, request);

    // Numbers.
    problem.softmax_scale = request.softmax_scale.value_or(
        1.0 /
        std::sqrt(static_cast<double>(problem.head_dim + (problem.qv ? problem.head_dim_v : 0))));
    // Kernels compute with float32, and in powers of two: what they are given must fit.
    if (!std::isfinite(static_cast<float>(problem.score_scale())))
        check.value(std::string(request.scale_name) + " is not a number of float32's range",
                    text_of(problem.softmax_scale), "a finite number below 2e38");
    problem.softcap = request.softcap;
    const bool cap_fits = problem.softcap >= FLT_MIN &&
                          std::isfinite(static_cast<float>(problem.softcap_log2())) &&
                          std::isfinite(static_cast<float>(problem.score_scale()));
    if (problem.softcap != 0 && !cap_fits)
        check.value("softcap is out of range", text_of(problem.softcap),
                    "a number > 0 of float32's range, or 0 for none");
    const Dropout dropout = checked_dropout(check, request);
    if (dropout.p > 0) problem.dropout = dropout;
    if (request.num_splits < 0 || request.num_splits > max_seqlen)
        check.value("num_splits is out of range", std::to_string(request.num_splits),
                    "0 (the backend's choice) to " + std::to_string(max_seqlen));
    problem.num_splits = request.num_splits;

    // Visibility. A causal mask is a window whose right edge is the diagonal.
    check_window(check, "left", request.window_left);
    check_window(check, "right", request.window_right);
    if (request.attention_chunk < 0 || request.attention_chunk > max_seqlen)
        check.value("attention_chunk is out of range", std::to_string(request.attention_chunk),
                    "0 (none) to " + std::to_string(max_seqlen));
    problem.causal = request.causal != Causal::none;
    problem.top_left = request.causal == Causal::top_left;
    problem.visible.seqlen_kv = problem.seqlen_kv;
    problem.visible.offset = problem.top_left ? 0 : problem.seqlen_kv - problem.seqlen_q;
    problem.visible.left = request.window_left;
    problem.visible.right = problem.causal ? 0 : request.window_right;
    problem.visible.chunk = request.attention_chunk;

    if (request.alibi_slopes) problem.alibi = checked_alibi(check, problem, request);
    if (request.rotary_cos || request.rotary_sin)
        problem.rotary = checked_rotary(check, problem, request);
    if (request.sinks) problem.sinks = checked_sinks(check, problem, request);
    if (request.attn_mask) problem.mask = broadcast_mask(check, problem, *request.attn_mask);
    if (problem.append) {  // what is read besides may not lie in the caches
        for (const auto& [cache, name] : {std::pair{&k, &k_name}, {&v, &v_name}})
            check_apart_from_parts(check, problem, *cache, *name);
    }
    problem.merge_batch();

    problem.wants_lse = request.wants_lse || request.lse.has_value();
    if (request.out) problem.set_out(*request.out);
    if (request.lse) problem.set_lse(*request.lse);
    return problem;
}

TensorView Problem::out_shape() const {
    TensorView shape = query.view;
    shape.ndim = ndim;
    std::copy_n(batch_shape, std::max(ndim - 3, 0), shape.shape);
    if (ndim >= 3) shape.shape[ndim - head_of(layout)] = nheads_q;
    shape.shape[ndim - row_of(layout)] = query_rows;
    shape.shape[ndim - 1] = head_dim_v;
    return shape;
}

TensorView Problem::lse_shape() const {
    TensorView shape = out_shape();
    shape.ndim = ndim - 1;
    if (ndim >= 3) shape.shape[ndim - 3] = nheads_q;
    shape.shape[ndim - 2] = query_rows;
    shape.dtype = DType::f32;
    return shape;
}

void Problem::set_out(const TensorView& view) {
    check_writable(Checker{function}, *this, view, out_shape(), "out");
    out = operand_of(view, layout);
    merge_batch();
}

void Problem::set_lse(const TensorView& view) {
    const Checker check{function};
    check_writable(check, *this, view, lse_shape(), "softmax_lse");
    if (out) check_overlap(check, view, "softmax_lse", out->view, "out");
    lse = Operand{view, 0, stride_at(view, 2), view.strides[view.ndim - 1], 0};
    wants_lse = true;
    merge_batch();
}

SequenceRows Problem::sequence(int64_t b) const {
    if (sequences.given) return sequences.rows[static_cast<size_t>(b)];
    return {b, 0, b, 0, seqlen_q, seqlen_kv, seqlen_kv - seqlen_q};
}

Visible<int64_t> Problem::visible_of(const SequenceRows& rows) const {
    Visible<int64_t> own = visible;
    own.seqlen_kv = rows.seqlen_kv;
    own.offset = top_left ? 0 : rows.seqlen_kv - rows.seqlen_q;
    return own;
}

std::vector<RowRange> Problem::unused_rows() const {
    std::vector<RowRange> found;
    if (!sequences.given) return found;
    int64_t at_batch = 0, at_row = 0;  // the first row that is not accounted for
    const auto skip_to = [&](int64_t to_batch, int64_t to_row) {
        for (; at_batch < to_batch; ++at_batch, at_row = 0)
            if (at_row < query_rows) found.push_back({at_batch, at_row, query_rows - at_row});
        if (at_batch == to_batch && at_row < to_row)
            found.push_back({at_batch, at_row, to_row - at_row});
    };
    for (const SequenceRows& rows : sequences.rows) {  // which follow each other in the tensor
        skip_to(rows.query_batch, rows.query_row);
        at_row = std::max(at_row, rows.query_row + rows.seqlen_q);
    }
    skip_to(ndim == 4 ? batch_shape[0] : 1, 0);
    return found;
}

double Problem::score_scale() const {
    return softcap > 0 ? softmax_scale / softcap : softmax_scale * log2_e;
}

double Problem::softcap_log2() const { return softcap * log2_e; }

uint32_t Problem::features() const {
    uint32_t set = 0;
    const auto add = [&](Feature feature, bool used) {
        if (used) set |= bit(feature);
    };
    add(Feature::causal, causal);
    add(Feature::window, visible.left >= 0 || (!causal && visible.right >= 0));
    add(Feature::softcap, softcap > 0);
    add(Feature::alibi, alibi.has_value());
    add(Feature::lse, wants_lse);
    add(Feature::gqa, nheads_q != nheads_kv);
    add(Feature::mask, mask.has_value());
    add(Feature::sinks, sinks.has_value());
    add(Feature::block_mask, block_mask.has_value());
    add(Feature::score_program, score_program.has_value());
    add(Feature::varlen, sequences.given);
    add(Feature::paged_kv, page_size > 0);
    add(Feature::attention_chunk, visible.chunk > 0);
    add(Feature::append, append.has_value());
    add(Feature::rotary, rotary.has_value());
    add(Feature::qv, qv.has_value());
    add(Feature::dropout, dropout.has_value());
    add(Feature::quantised,
        quantised_query.has_value() || quantised_key.has_value() || quantised_value.has_value());
    return set;
}

}  // namespace umfa
