#include "core/backward.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/parts.h"

namespace umfa {
namespace {

constexpr const char* gradient_names[gradient_count] = {"dq",    "dk",     "dv",           "dqv",
                                                        "dmask", "dsinks", "dalibi_slopes"};
constexpr Field gradient_fields[gradient_count] = {
    Field::query,          Field::key,         Field::value, Field::qv, Field::attn_mask,
    Field::learnable_sink, Field::alibi_slopes};

/// The tensor that the gradient belongs to; null if the problem has none.
const TensorView* tensor_of(const Problem& problem, Gradient gradient) {
    switch (gradient) {
        case Gradient::query: return &problem.query.view;
        case Gradient::key: return &problem.key.view;
        case Gradient::value: return &problem.value.view;
        case Gradient::qv: return problem.qv ? &problem.qv->view : nullptr;
        case Gradient::mask: return problem.mask ? &problem.mask->given : nullptr;
        case Gradient::sinks: return problem.sinks ? &problem.sinks->logits : nullptr;
        case Gradient::alibi_slopes: return problem.alibi ? &problem.alibi->view : nullptr;
    }
    return nullptr;
}

/// The steps of BackwardProblem::make(), in their order.
class Maker {
public:
    explicit Maker(const BackwardRequest& request)
        : request_(request),
          names_(*request.attention.function),
          check_{request.attention.function->name} {}

    BackwardProblem make() {
        if (request_.attention.out)
            check_.value(names_[Field::out] + " is not written by a backward pass", "a tensor",
                         "none");
        AttentionRequest call = request_.attention;
        call.return_lse = call.return_attn_probs = false;
        problem_.forward = Problem::make(call);
        read_saved();
        read_wanted();
        check_keys_apart();
        return std::move(problem_);
    }

private:
    const TensorView& given(const std::optional<TensorView>& view, const char* name) const {
        if (!view) check_.value(std::string(name) + " is missing", "none", "a tensor");
        return *view;
    }

    void check_shape(const TensorView& view, const TensorView& shape, const char* name) const {
        if (view.ndim != shape.ndim || !std::equal(view.shape, view.shape + view.ndim, shape.shape))
            check_.value(std::string(name) + " has the wrong shape", shape_text(view),
                         shape_text(shape));
    }

    void check_saved(const TensorView& view, const TensorView& shape, const char* name) const {
        check_shape(view, shape, name);
        check_same_device(check_, view, name, problem_.forward.query.view);
        check_memory(check_, view, name);
    }

    Operand read_rows(const std::optional<TensorView>& saved, const char* name) const {
        const TensorView& view = given(saved, name);
        check_float_dtype(check_, view, name);
        check_saved(view, problem_.forward.out_shape(), name);
        Operand operand = operand_of(view, problem_.forward.layout);
        operand.stride_batch = stride_at(view, 4);
        return operand;
    }

    Operand read_lse(const TensorView& view, const char* name) const {
        if (view.dtype != DType::f32)
            check_.type(std::string(name) + " has the wrong dtype", name_of(view.dtype), "float32");
        check_saved(view, problem_.forward.lse_shape(), name);
        return {view, stride_at(view, 3), stride_at(view, 2), view.strides[view.ndim - 1], 0};
    }

    void read_saved() {
        problem_.out = read_rows(request_.out, "out");
        const DType dtype = problem_.out.view.dtype;
        const std::optional<DType>& asked = request_.attention.out_dtype;
        if (asked && *asked != dtype)
            check_.type("out and " + names_[Field::out_dtype] + " differ",
                        std::string(name_of(dtype)) + " and " + name_of(*asked), "one dtype");
        problem_.forward.out_dtype = dtype;
        problem_.lse = read_lse(given(request_.lse, "lse"), "lse");
        problem_.dout = read_rows(request_.dout, "dout");
        if (request_.dlse) problem_.dlse = read_lse(*request_.dlse, "dlse");
    }

    void read_wanted() {
        problem_.wanted = request_.wanted;
        if (problem_.wanted == 0 || problem_.wanted >> gradient_count != 0)
            check_.value("no gradient is wanted", std::to_string(problem_.wanted),
                         "one or more of dq, dk, dv, dqv, dmask, dsinks, dalibi_slopes");
        for (size_t i = 0; i < gradient_count; ++i) {
            const auto gradient = static_cast<Gradient>(i);
            if (!problem_.wants(gradient)) continue;
            const TensorView* tensor = tensor_of(problem_.forward, gradient);
            const std::string& of = names_[gradient_fields[i]];
            if (!tensor)
                check_.value(std::string(gradient_names[i]) + " is the gradient of " + of,
                             "a call without " + of, of + ", or no " + gradient_names[i]);
            if (tensor->dtype == DType::b8)
                check_.type(of + " has no gradient", "bool", "float32, float16 or bfloat16");
        }
    }

    /// Two sequences that share keys would both add to the gradient of one row.
    void check_keys_apart() const {
        const Problem& forward = problem_.forward;
        if (!forward.sequences.given || forward.page_size > 0 || forward.append) return;
        std::vector<SequenceRows> rows = forward.sequences.rows;
        std::erase_if(rows, [](const SequenceRows& one) { return one.seqlen_kv == 0; });
        std::sort(rows.begin(), rows.end(), [](const SequenceRows& a, const SequenceRows& b) {
            return a.kv_batch != b.kv_batch ? a.kv_batch < b.kv_batch : a.kv_row < b.kv_row;
        });
        for (size_t i = 1; i < rows.size(); ++i) {
            const SequenceRows &before = rows[i - 1], &now = rows[i];
            if (before.kv_batch == now.kv_batch && before.kv_row + before.seqlen_kv > now.kv_row)
                check_.unsupported("two sequences share keys, whose gradient would be their sum",
                                   names_[Field::cache_batch_idx] + " with index " +
                                       std::to_string(now.kv_batch) + " twice",
                                   "keys of its own for each sequence");
        }
    }

    const BackwardRequest& request_;
    const Function& names_;
    const Checker check_;
    BackwardProblem problem_;
};

}  // namespace

const char* name_of(Gradient gradient) { return gradient_names[static_cast<size_t>(gradient)]; }

std::optional<Gradient> gradient_named(std::string_view name) {
    for (size_t i = 0; i < gradient_count; ++i)
        if (name == gradient_names[i]) return static_cast<Gradient>(i);
    return {};
}

BackwardProblem BackwardProblem::make(const BackwardRequest& request) {
    return Maker(request).make();
}

TensorView BackwardProblem::shape_of(Gradient gradient) const {
    return *tensor_of(forward, gradient);
}

bool BackwardProblem::broadcasts(Gradient gradient) const {
    if (gradient != Gradient::query && gradient != Gradient::key && gradient != Gradient::value)
        return false;
    const TensorView& own = *tensor_of(forward, gradient);
    if (size_at(own, head_of(forward.layout)) !=
        (gradient == Gradient::query ? forward.nheads_q : forward.nheads_kv))
        return true;
    if (forward.sequences.given) return false;
    for (int i = 0; i < forward.ndim - 3; ++i)
        if (size_at(own, forward.ndim - i) != forward.batch_shape[i]) return true;
    return false;
}

DenseMask BackwardProblem::mask_gradient(const TensorView& view) const {
    DenseMask found{view, view};
    found.view.ndim = 4;
    std::copy_n(forward.mask->view.shape, 4, found.view.shape);
    for (int i = 1; i <= 4; ++i) found.view.strides[4 - i] = stride_at(view, i);
    return found;
}

BackwardResults BackwardProblem::results(const Gradients& gradients) const {
    const Checker check{forward.function};
    for (size_t i = 0; i < gradient_count; ++i) {
        const auto gradient = static_cast<Gradient>(i);
        const std::string name = gradient_names[i];
        const std::optional<TensorView>& view = gradients[i];
        if (view.has_value() != wants(gradient))
            check.value(name + (view ? " is not wanted" : " is missing"),
                        view ? "a tensor" : "none", view ? "none" : "a tensor");
        if (!view) continue;
        TensorView shape = shape_of(gradient);
        if (view->dtype == DType::f32) shape.dtype = DType::f32;
        check_writable(check, forward, *view, shape, name);
        check_overlap(check, *view, name, out.view, "out");
        check_overlap(check, *view, name, lse.view, "lse");
        check_overlap(check, *view, name, dout.view, "dout");
        if (dlse) check_overlap(check, *view, name, dlse->view, "dlse");
        for (size_t j = 0; j < i; ++j)
            if (gradients[j] && !interleaved(*view, *gradients[j]))
                check_both_written(check, *view, name, *gradients[j], gradient_names[j]);
    }
    BackwardResults found;
    const auto rows = [&](Gradient gradient, std::optional<Operand>& operand) {
        const auto& view = gradients[static_cast<size_t>(gradient)];
        if (!view) return;
        operand = operand_of(*view, forward.layout);
        operand->stride_batch = stride_at(*view, 4);
    };
    rows(Gradient::query, found.query);
    rows(Gradient::key, found.key);
    rows(Gradient::value, found.value);
    rows(Gradient::qv, found.qv);
    if (const auto& view = gradients[static_cast<size_t>(Gradient::mask)])
        found.mask = mask_gradient(*view);
    if (const auto& view = gradients[static_cast<size_t>(Gradient::sinks)])
        found.sinks = Sinks{*view};
    if (const auto& view = gradients[static_cast<size_t>(Gradient::alibi_slopes)])
        found.alibi_slopes =
            Alibi{*view, view->ndim == 2 ? view->strides[0] : 0, view->strides[view->ndim - 1]};
    return found;
}

}  // namespace umfa
