#include "core/problem.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iterator>
#include <utility>

#include "core/parts.h"

namespace umfa {
namespace {

std::string dims_text(Layout layout, bool broadcasts) {
    if (broadcasts)
        return "2 to " + std::to_string(TensorView::max_ndim) + ": (..., nheads, seqlen, head_dim)";
    return layout == Layout::bshd ? "4: (batch, seqlen, nheads, head_dim)"
                                  : "4: (batch, nheads, seqlen, head_dim)";
}

/// That what is written lies in none of the tensors of the orthogonal parts.
void check_apart_from_parts(const Checker& check, const Problem& problem, const TensorView& view,
                            const std::string& name) {
    if (problem.alibi)
        check_overlap(check, view, name, problem.alibi->view,
                      (*problem.names)[Field::alibi_slopes]);
    if (problem.mask)
        check_overlap(check, view, name, problem.mask->given, (*problem.names)[Field::attn_mask]);
    if (problem.sinks)
        check_overlap(check, view, name, problem.sinks->logits,
                      (*problem.names)[Field::learnable_sink]);
    if (problem.qv) check_overlap(check, view, name, problem.qv->view, (*problem.names)[Field::qv]);
    for (const auto* codes : {&problem.key_codes, &problem.value_codes}) {
        if (!*codes) continue;
        if ((*codes)->scales) check_overlap(check, view, name, (*codes)->scales->view, "scales");
        if ((*codes)->offsets)
            check_overlap(check, view, name, (*codes)->offsets->view, "zero points");
    }
    if (problem.rotary) {
        check_overlap(check, view, name, problem.rotary->cos, (*problem.names)[Field::rotary_cos]);
        check_overlap(check, view, name, problem.rotary->sin, (*problem.names)[Field::rotary_sin]);
    }
}

}  // namespace

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
    check_overlap(check, view, name, problem.query.view, (*problem.names)[Field::query]);
    check_overlap(check, view, name, problem.key.view, (*problem.names)[Field::key]);
    check_overlap(check, view, name, problem.value.view, (*problem.names)[Field::value]);
    check_apart_from_parts(check, problem, view, name);
    if (problem.append) {
        check_overlap(check, view, name, problem.append->key.view,
                      (*problem.names)[Field::new_key]);
        check_overlap(check, view, name, problem.append->value.view,
                      (*problem.names)[Field::new_value]);
    }
}

const char* name_of(Feature feature) {
    switch (feature) {
        case Feature::causal: return "causal";
        case Feature::window: return "window_size";
        case Feature::softcap: return "softcap";
        case Feature::alibi: return "alibi_slopes";
        case Feature::lse: return "the log-sum-exp";
        case Feature::gqa: return "grouped-query attention";
        case Feature::mask: return "attn_mask";
        case Feature::sinks: return "learnable_sink";
        case Feature::varlen: return "a table of sequences (cu_seqlens, cache_seqlens)";
        case Feature::paged_kv: return "block_table";
        case Feature::dropout: return "dropout_p";
        case Feature::attention_chunk: return "attention_chunk";
        case Feature::append: return "appending to the cache";
        case Feature::rotary: return "rotary_cos";
        case Feature::qv: return "qv";
        case Feature::quantized: return "a quantised key or value";
        case Feature::quant_mode: return "a mode that quantises query and key";
    }
    return "unknown";
}

namespace {

/// The steps of Problem::make(), in their order.
class Maker {
public:
    explicit Maker(const AttentionRequest& request)
        : request_(request), names_(*request.function), check_{request.function->name} {
        problem_.function = names_.name;
        problem_.names = &names_;
        problem_.layout = names_.layout;
    }

    Problem make() {
        check_present();
        problem_.key_codes = checked_codes(check_, request_, Field::key, request_.key_format, key_);
        problem_.value_codes =
            checked_codes(check_, request_, Field::value, request_.value_format, value_);
        check_each();
        check_devices();
        problem_.out_dtype =
            checked_out_dtype(check_, {request_.out_dtype, names_[Field::out_dtype]},
                              {request_.out, names_[Field::out]}, query().dtype);
        read_batch();
        read_heads();
        read_lengths();
        read_sequences();
        check_groups();
        check_result_size();
        problem_.query = operand_of(query(), names_.layout);
        problem_.key = operand_of(key(), names_.layout);
        problem_.value = operand_of(value(), names_.layout);
        // What follows reads memory: that of the bytes.
        problem_.key.view = *request_.key;
        problem_.value.view = *request_.value;
        if (request_.qv) problem_.qv = checked_qv(check_, problem_, request_);
        read_numbers();
        read_visibility();
        read_parts();
        merge_batch(problem_);
        problem_.wants_lse = request_.return_lse || request_.return_attn_probs;
        if (request_.out) problem_.results(*request_.out);
        return std::move(problem_);
    }

private:
    const TensorView& query() const { return *request_.query; }
    const TensorView& key() const { return key_; }
    const TensorView& value() const { return value_; }
    int row() const { return row_of(names_.layout); }
    int head() const { return head_of(names_.layout); }

    static constexpr Field operands[] = {Field::query, Field::key, Field::value};
    const TensorView& view_of(Field field) const {
        return field == Field::query ? query() : field == Field::key ? key() : value();
    }

    void check_present() const {
        const std::optional<TensorView>* views[] = {&request_.query, &request_.key,
                                                    &request_.value};
        for (size_t i = 0; i < std::size(views); ++i)
            if (!*views[i]) check_.value(names_[operands[i]] + " is missing", "none", "a tensor");
    }

    void check_each() const {
        for (const Field field : operands) {
            const TensorView& view = view_of(field);
            const bool packed = field == Field::query
                                    ? request_.cu_seqlens_q.has_value()
                                    : request_.cu_seqlens_k && !request_.block_table;
            if (names_.broadcasts ? view.ndim < 2 : view.ndim != (packed ? 3 : 4))
                check_.value(names_[field] + " has " + std::to_string(view.ndim) + " dimensions",
                             "shape " + shape_text(view),
                             packed ? "3: (total, nheads, head_dim)"
                                    : dims_text(names_.layout, names_.broadcasts));
            if (has_codes(field)) continue;
            check_float_dtype(check_, view, names_[field]);
            check_memory(check_, view, names_[field]);
        }
    }

    bool has_codes(Field field) const {
        return (field == Field::key && problem_.key_codes) ||
               (field == Field::value && problem_.value_codes);
    }

    void check_devices() const {
        for (const Field field : operands) {
            const TensorView& view = view_of(field);
            if (view.device != query().device || view.device_id != query().device_id)
                check_.value("device differs: " + names_[Field::query] + " is on " +
                                 device_text(query()) + ", " + names_[field] + " on " +
                                 device_text(view),
                             device_text(view), device_text(query()));
        }
    }

    std::string shapes_text() const {
        return names_[Field::query] + " " + shape_text(query()) + ", " + names_[Field::key] + " " +
               shape_text(key()) + ", " + names_[Field::value] + " " + shape_text(value());
    }

    [[noreturn]] void differ(const std::string& what, Field a, Field b, int dimension,
                             const std::string& expected) const {
        check_.value(what + " differs: " + names_[a] + " has " +
                         std::to_string(size_at(view_of(a), dimension)) + ", " + names_[b] +
                         " has " + std::to_string(size_at(view_of(b), dimension)),
                     shapes_text(), expected);
    }

    void check_same(const char* what, Field a, Field b, int dimension) const {
        if (size_at(view_of(a), dimension) != size_at(view_of(b), dimension))
            differ(what, a, b, dimension, std::string("equal ") + what);
    }

    /// The size to which a dimension of query, key and value broadcasts.
    int64_t broadcast(const char* what, int dimension, const char* expected) const {
        int64_t size = 1;
        std::optional<Field> first;
        for (const Field field : operands) {
            const int64_t own = size_at(view_of(field), dimension);
            if (own == 1) continue;
            if (first && own != size) differ(what, *first, field, dimension, expected);
            first = field;
            size = own;
        }
        return size;
    }

    void read_batch() {
        if (!names_.broadcasts) {
            problem_.ndim = query().ndim;
            if (!request_.has_tables()) check_same("batch", Field::query, Field::key, 4);
            check_same("batch", Field::key, Field::value, 4);
            problem_.batch_shape[0] = size_at(query(), 4);
            return;
        }
        problem_.ndim = std::max({query().ndim, key().ndim, value().ndim});
        for (int i = 0; i < problem_.ndim - 3; ++i)
            problem_.batch_shape[i] =
                broadcast("batch", problem_.ndim - i, "equal batch sizes, or 1");
    }

    void read_heads() {
        check_same("head_dim", Field::query, Field::key, 1);
        if (!names_.broadcasts) check_same("nheads", Field::key, Field::value, head());
        check_same("seqlen", Field::key, Field::value, row());
        problem_.nheads_q = size_at(query(), head());
        problem_.nheads_kv = size_at(key(), head());
        if (!names_.broadcasts) return;
        const int64_t key_heads = size_at(key(), head()), value_heads = size_at(value(), head());
        if (!request_.grouped) {
            problem_.nheads_q = broadcast("nheads", head(),
                                          "equal nheads, or 1; enable_gqa=True lets heads share "
                                          "keys");
            // One key head for all is read as a group, where both have but one.
            if (key_heads != 1 || value_heads != 1) problem_.nheads_kv = problem_.nheads_q;
            return;
        }
        problem_.nheads_kv =
            key_heads == 0 || value_heads == 0 ? 0 : std::max(key_heads, value_heads);
        for (const int64_t heads : {key_heads, value_heads})
            if (heads != 1 && heads != problem_.nheads_kv)
                check_same("nheads", Field::key, Field::value, head());
    }

    void check_head_dim(int64_t size, int64_t most, Field field) const {
        const std::string expected = "1 to " + std::to_string(most);
        if (size < 1)
            check_.value("head_dim of " + names_[field] + " is too small", std::to_string(size),
                         expected);
        if (size > most)
            check_.unsupported("head_dim of " + names_[field] + " is too large",
                               std::to_string(size), expected);
    }

    void read_lengths() {
        problem_.query_rows = size_at(query(), row());
        problem_.seqlen_q = problem_.query_rows;
        problem_.seqlen_kv = size_at(key(), row());
        problem_.head_dim = size_at(query(), 1);
        problem_.head_dim_v = size_at(value(), 1);
        check_head_dim(problem_.head_dim, max_head_dim, Field::query);
        check_head_dim(problem_.head_dim_v, max_head_dim_v, Field::value);
        for (const auto& [length, field] :
             {std::pair{problem_.seqlen_q, Field::query}, {problem_.seqlen_kv, Field::key}})
            if (length > max_seqlen)
                check_.unsupported("seqlen of " + names_[field] + " is too large",
                                   std::to_string(length), "at most " + std::to_string(max_seqlen));
    }

    void read_sequences() {
        if (request_.new_key.has_value() != request_.new_value.has_value()) {
            const std::string &k = names_[Field::new_key], &v = names_[Field::new_value];
            check_.value(k + " and " + v + " must be given together",
                         (request_.new_key ? k : v) + " alone", "both or neither");
        }
        if (request_.new_key) problem_.append = checked_append(check_, problem_, request_);
        if (!request_.has_tables() && !problem_.append) return;
        SequenceShapes shapes{problem_.batch_shape[0], problem_.query_rows, size_at(key(), 4),
                              size_at(key(), row())};
        if (request_.new_key) {
            shapes.new_batch = size_at(*request_.new_key, 4);
            shapes.new_rows = size_at(*request_.new_key, 3);
        }
        problem_.sequences = umfa::read_sequences(request_, shapes);
        problem_.page_size = request_.block_table ? size_at(key(), row()) : 0;
        problem_.seqlen_q = problem_.seqlen_kv = 0;
        for (SequenceRows& rows : problem_.sequences.rows) {
            if (!problem_.append)  // rotary angles of all keys count from the first
                rows.position_q = request_.causal_alignment == Alignment::top_left
                                      ? 0
                                      : rows.seqlen_kv - rows.seqlen_q;
            problem_.seqlen_q = std::max(problem_.seqlen_q, rows.seqlen_q);
            problem_.seqlen_kv = std::max(problem_.seqlen_kv, rows.seqlen_kv);
        }
    }

    void check_groups() const {
        const bool divides = problem_.nheads_kv > 0 ? problem_.nheads_q % problem_.nheads_kv == 0
                                                    : problem_.nheads_q == 0;
        if (!divides)  // where nheads broadcasts, it does
            check_.value(
                "nheads of " + names_[Field::query] + " is not a multiple of nheads of " +
                    names_[Field::key],
                std::to_string(problem_.nheads_q) + " and " + std::to_string(problem_.nheads_kv),
                "nheads_q % nheads_kv == 0");
    }

    /// Expanded tensors that broadcast can ask for more elements than 64 bits count.
    void check_result_size() const {
        int64_t elements = problem_.nheads_q;
        bool fits = !__builtin_mul_overflow(elements, problem_.seqlen_q, &elements) &&
                    !__builtin_mul_overflow(elements, problem_.head_dim_v, &elements);
        for (int i = 0; i < problem_.ndim - 3; ++i)
            fits = fits && !__builtin_mul_overflow(elements, problem_.batch_shape[i], &elements);
        if (!fits)
            check_.value("the result is too large", shapes_text(), "less than 2^63 elements");
    }

    void read_numbers() {
        problem_.softmax_scale = request_.softmax_scale.value_or(
            1.0 / std::sqrt(static_cast<double>(problem_.head_dim +
                                                (problem_.qv ? problem_.head_dim_v : 0))));
        // Kernels compute with float32, and in powers of two: what they are given must fit.
        if (!std::isfinite(static_cast<float>(problem_.score_scale())))
            check_.value(names_[Field::softmax_scale] + " is not a number of float32's range",
                         text_of(problem_.softmax_scale), "a finite number below 2e38");
        problem_.softcap = request_.softcap;
        const bool cap_fits = problem_.softcap >= FLT_MIN &&
                              std::isfinite(static_cast<float>(problem_.softcap_log2())) &&
                              std::isfinite(static_cast<float>(problem_.score_scale()));
        if (problem_.softcap != 0 && !cap_fits)
            check_.value(names_[Field::softcap] + " is out of range", text_of(problem_.softcap),
                         "a number > 0 of float32's range, or 0 for none");
        const Dropout dropout = checked_dropout(check_, request_);
        if (dropout.p > 0) problem_.dropout = dropout;
        if (request_.num_splits < 0 || request_.num_splits > max_seqlen)
            check_.value(names_[Field::num_splits] + " is out of range",
                         std::to_string(request_.num_splits),
                         "0 (the backend's choice) to " + std::to_string(max_seqlen));
        problem_.num_splits = request_.num_splits;
        problem_.batch_invariant = request_.batch_invariant;
        if (!request_.smooth_k && request_.quant_mode == QuantMode::none)
            check_.value(names_[Field::smooth_k] + " is for a " + names_[Field::quant_mode] +
                             " that quantises the keys",
                         "False", "True, or such a " + names_[Field::quant_mode]);
        problem_.quant_mode = request_.quant_mode;
        problem_.smooth_k = request_.smooth_k;
    }

    /// One bound of the window, UMFA_UNBOUNDED where there is none.
    int64_t bound(const char* side, int64_t width) const {
        const bool offsets = request_.window_offsets;
        // As flash-attn 4 has it: bounds that leave no key bound nothing.
        const bool leave_none =
            offsets &&
            request_.window_size_left + (request_.causal ? 0 : request_.window_size_right) < 0;
        if (width < (offsets ? -max_seqlen : -1) || width > max_seqlen)
            check_.value(names_[Field::window_size] + " " + side + " is out of range",
                         std::to_string(width),
                         offsets ? "a number of keys of at most " + std::to_string(max_seqlen)
                                 : "-1 (unbounded) or 0 to " + std::to_string(max_seqlen));
        return leave_none || (!offsets && width == -1) ? UMFA_UNBOUNDED : width;
    }

    /// A causal mask is a window whose right edge is the diagonal.
    void read_visibility() {
        const int64_t left = bound("left", request_.window_size_left);
        const int64_t right = bound("right", request_.window_size_right);
        if (request_.attention_chunk < 0 || request_.attention_chunk > max_seqlen)
            check_.value(names_[Field::attention_chunk] + " is out of range",
                         std::to_string(request_.attention_chunk),
                         "0 (none) to " + std::to_string(max_seqlen));
        if (request_.attention_chunk_offset != 0 && request_.attention_chunk == 0)
            check_.value(
                names_[Field::attention_chunk_offset] + " needs " + names_[Field::attention_chunk],
                std::to_string(request_.attention_chunk_offset), "0 without chunks");
        problem_.causal = request_.causal;
        problem_.top_left = request_.causal_alignment == Alignment::top_left;
        problem_.visible.seqlen_kv = problem_.seqlen_kv;
        problem_.visible.offset = problem_.top_left ? 0 : problem_.seqlen_kv - problem_.seqlen_q;
        problem_.visible = with_window(problem_.visible, left, problem_.causal ? 0 : right);
        problem_.visible.chunk = request_.attention_chunk;
        if (const int64_t chunk = request_.attention_chunk; chunk > 0)
            problem_.visible.chunk_offset =
                (request_.attention_chunk_offset % chunk + chunk) % chunk;
    }

    void read_parts() {
        if (request_.alibi_slopes) problem_.alibi = checked_alibi(check_, problem_, request_);
        if (request_.rotary_cos || request_.rotary_sin)
            problem_.rotary = checked_rotary(check_, problem_, request_);
        if (request_.rotary_seqlens && !(problem_.rotary && problem_.append))
            check_.value(
                names_[Field::rotary_seqlens] + " is for new keys that are rotated",
                "a table without " + names_[problem_.append ? Field::rotary_cos : Field::new_key],
                names_[Field::new_key] + " and " + names_[Field::rotary_cos]);
        if (request_.learnable_sink) problem_.sinks = checked_sinks(check_, problem_, request_);
        if (request_.attn_mask)
            problem_.mask = broadcast_mask(check_, problem_, *request_.attn_mask);
        if (!problem_.append) return;
        for (const Field cache : {Field::key, Field::value})  // which are written
            check_apart_from_parts(check_, problem_, view_of(cache), names_[cache]);
    }

    const AttentionRequest& request_;
    const Function& names_;
    const Checker check_;
    TensorView key_, value_;  // of quantised ones the shape of their numbers
    Problem problem_;
};

}  // namespace

Problem Problem::make(const AttentionRequest& request) { return Maker(request).make(); }

TensorView Problem::out_shape() const {
    TensorView shape = query.view;
    shape.ndim = ndim;
    std::copy_n(batch_shape, std::max(ndim - 3, 0), shape.shape);
    if (ndim >= 3) shape.shape[ndim - head_of(layout)] = nheads_q;
    shape.shape[ndim - row_of(layout)] = query_rows;
    shape.shape[ndim - 1] = head_dim_v;
    shape.dtype = out_dtype;
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

ForwardResults Problem::results(const TensorView& out, const std::optional<TensorView>& lse) const {
    const Checker check{function};
    check_writable(check, *this, out, out_shape(), "out");
    if (lse) {
        check_writable(check, *this, *lse, lse_shape(), "lse");  // C's name: Python allocates it
        check_both_written(check, *lse, "lse", out, "out");
    }
    return results_in(out, lse);
}

ForwardResults Problem::results_in(const TensorView& out,
                                   const std::optional<TensorView>& lse) const {
    ForwardResults results{operand_of(out, layout), {}};
    results.out.stride_batch = stride_at(out, 4);
    if (lse)
        results.lse =
            Operand{*lse, stride_at(*lse, 3), stride_at(*lse, 2), lse->strides[lse->ndim - 1], 0};
    return results;
}

ForwardResults Problem::results_without_memory(const std::optional<TensorView>& out) const {
    // The address stays the query's: loops over batches move it, but nobody reads or writes there.
    const auto dense = [](TensorView view) {
        int64_t stride = 1;
        for (int i = view.ndim - 1; i >= 0; --i) {
            view.strides[i] = stride;
            stride *= view.shape[i];
        }
        return view;
    };
    const std::optional<TensorView> lse =
        wants_lse ? std::optional(dense(lse_shape())) : std::nullopt;
    return results_in(out ? *out : dense(out_shape()), lse);
}

SequenceRows Problem::sequence(int64_t b) const {
    if (sequences.given) return sequences.rows[static_cast<size_t>(b)];
    return {b, 0, b, 0, seqlen_q, seqlen_kv, top_left ? 0 : seqlen_kv - seqlen_q};
}

Visible<int64_t> Problem::visible_of(const SequenceRows& rows) const {
    Visible<int64_t> own = visible;
    own.seqlen_kv = rows.seqlen_kv;
    own.prefix = rows.prefix;
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

bool Problem::one_dtype() const {
    const DType dtype = query.view.dtype;
    return key.view.dtype == dtype && value.view.dtype == dtype && out_dtype == dtype;
}

uint32_t Problem::features() const {
    uint32_t set = 0;
    const auto add = [&](Feature feature, bool used) {
        if (used) set |= bit(feature);
    };
    add(Feature::causal, causal);
    add(Feature::window,
        visible.left != UMFA_UNBOUNDED || (!causal && visible.right != UMFA_UNBOUNDED));
    add(Feature::softcap, softcap > 0);
    add(Feature::alibi, alibi.has_value());
    add(Feature::lse, wants_lse);
    add(Feature::gqa, nheads_q != nheads_kv);
    add(Feature::mask, mask.has_value());
    add(Feature::sinks, sinks.has_value());
    add(Feature::varlen, sequences.given);
    add(Feature::paged_kv, page_size > 0);
    add(Feature::attention_chunk, visible.chunk > 0);
    add(Feature::append, append.has_value());
    add(Feature::rotary, rotary.has_value());
    add(Feature::qv, qv.has_value());
    add(Feature::dropout, dropout.has_value());
    add(Feature::quantized, key_codes.has_value() || value_codes.has_value());
    add(Feature::quant_mode, quant_mode != QuantMode::none);
    return set;
}

}  // namespace umfa
