#include "core/gradient_sums.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/parts.h"

namespace umfa {
namespace {

/// A tensor of float32 in host memory, contiguous.
class HostTensor {
public:
    explicit HostTensor(const TensorView& shape) : view_(shape) {
        numbers_.resize(static_cast<size_t>(shape.size()));
        view_.data = numbers_.data();
        view_.byte_offset = 0;
        view_.dtype = DType::f32;
        int64_t stride = 1;
        for (int i = view_.ndim - 1; i >= 0; --i) {
            view_.strides[i] = stride;
            stride *= view_.shape[i];
        }
    }
    HostTensor(const HostTensor&) = delete;
    HostTensor& operator=(const HostTensor&) = delete;

    const TensorView& view() const { return view_; }
    const std::vector<float>& numbers() const { return numbers_; }

private:
    TensorView view_;
    std::vector<float> numbers_;
};

/// Calls f(offset) for every index of the shape, the last dimension fastest: the offset, in elements,
/// under `strides`.
template <class F>
void for_each_offset(const TensorView& shape, const int64_t* strides, F&& f) {
    if (shape.size() == 0) return;
    int64_t index[TensorView::max_ndim] = {}, offset = 0;
    for (;;) {
        f(offset);
        int i = shape.ndim - 1;
        for (; i >= 0; --i) {
            offset += strides[i];
            if (++index[i] < shape.shape[i]) break;
            offset -= shape.shape[i] * strides[i];
            index[i] = 0;
        }
        if (i < 0) return;
    }
}

void store(const TensorView& to, int64_t offset, float x) {
    char* at = to.address() + offset * (bits_of(to.dtype) / 8);
    if (to.dtype == DType::f32) {
        std::memcpy(at, &x, sizeof x);
        return;
    }
    const uint16_t bits = to.dtype == DType::f16 ? half_from_float(x) : bfloat16_from_float(x);
    std::memcpy(at, &bits, sizeof bits);
}

/// to = the sum of `from` over the dimensions in which `to` has size 1 or none.
void reduce(const HostTensor& from, const TensorView& to) {
    HostTensor sums(to);
    const TensorView &all = from.view(), &few = sums.view();
    int64_t strides[TensorView::max_ndim];
    for (int i = 0; i < all.ndim; ++i) strides[i] = stride_at(few, all.ndim - i);
    float* sum = reinterpret_cast<float*>(few.data);
    const float* term = from.numbers().data();
    for_each_offset(all, strides, [&](int64_t offset) { sum[offset] += *term++; });
    const float* total = sum;
    for_each_offset(to, to.strides, [&](int64_t offset) { store(to, offset, *total++); });
}

/// to += from, of the same shape; `to` is float32.
void add(const HostTensor& from, const TensorView& to) {
    float* sum = reinterpret_cast<float*>(to.address());
    const float* term = from.numbers().data();
    for_each_offset(from.view(), to.strides, [&](int64_t offset) { sum[offset] += *term++; });
}

using Run = std::function<void(const BackwardProblem&, const BackwardResults&)>;

/// Gradients of query, key and value in the full shape, where those tensors broadcast.
class FullGradients {
public:
    FullGradients(const BackwardProblem& problem, BackwardResults& results) {
        const Problem& call = problem.forward;
        own(problem, Gradient::query, results.query, call.nheads_q, call.query_rows, call.head_dim);
        own(problem, Gradient::key, results.key, call.nheads_kv, call.seqlen_kv, call.head_dim);
        own(problem, Gradient::value, results.value, call.nheads_kv, call.seqlen_kv,
            call.head_dim_v);
    }

    void finish() const {
        for (const Full& one : full_) reduce(*one.tensor, one.result);
    }

private:
    struct Full {
        std::unique_ptr<HostTensor> tensor;
        TensorView result;
    };

    void own(const BackwardProblem& problem, Gradient gradient, std::optional<Operand>& result,
             int64_t nheads, int64_t rows, int64_t channels) {
        if (!result || !problem.broadcasts(gradient)) return;
        const Problem& call = problem.forward;
        TensorView shape = result->view;
        shape.ndim = std::max(call.ndim, 3);
        std::copy_n(call.batch_shape, shape.ndim - 3, shape.shape);
        shape.shape[shape.ndim - head_of(call.layout)] = nheads;
        shape.shape[shape.ndim - row_of(call.layout)] = rows;
        shape.shape[shape.ndim - 1] = channels;
        full_.push_back({std::make_unique<HostTensor>(shape), result->view});
        const TensorView& view = full_.back().tensor->view();
        result = operand_of(view, call.layout);
        result->stride_batch = stride_at(view, 4);
    }

    std::vector<Full> full_;
};

/// Sums over the parts of the batch of what they share.
class PartSums {
public:
    explicit PartSums(BackwardResults& results) {
        if (results.mask) {
            mask_ = std::make_unique<HostTensor>(results.mask->given);
            mask_result_ = results.mask->given;
            DenseMask own{mask_->view(), mask_->view()};
            own.view.ndim = 4;
            std::copy_n(results.mask->view.shape, 4, own.view.shape);
            for (int i = 1; i <= 4; ++i) own.view.strides[4 - i] = stride_at(mask_->view(), i);
            results.mask = own;
        }
        if (results.sinks) {
            sinks_ = std::make_unique<HostTensor>(results.sinks->logits);
            sinks_result_ = results.sinks->logits;
        }
        if (results.alibi_slopes) {
            slopes_ = std::make_unique<HostTensor>(results.alibi_slopes->view);
            slopes_result_ = results.alibi_slopes->view;
        }
    }

    void run(const BackwardProblem& part, const BackwardResults& results, const Run& run) const {
        BackwardResults own = results;
        std::unique_ptr<HostTensor> mask, sinks, slopes;
        if (mask_) {
            mask = std::make_unique<HostTensor>(results.mask->given);
            own.mask->given = mask->view();
            own.mask->view.data = mask->view().data;
            for (int i = 0; i < 4; ++i) own.mask->view.strides[i] = stride_at(mask->view(), 4 - i);
        }
        if (sinks_) {
            sinks = std::make_unique<HostTensor>(sinks_->view());
            own.sinks->logits = sinks->view();
        }
        if (slopes_) {
            slopes = std::make_unique<HostTensor>(slopes_->view());
            own.alibi_slopes = Alibi{slopes->view(), 0, 1};
        }
        run(part, own);
        if (mask) add(*mask, results.mask->given);
        if (sinks) add(*sinks, sinks_->view());
        if (slopes) add(*slopes, slopes_->view());
    }

    void finish() const {
        if (mask_) reduce(*mask_, mask_result_);
        if (sinks_) reduce(*sinks_, sinks_result_);
        if (slopes_) reduce(*slopes_, slopes_result_);
    }

private:
    std::unique_ptr<HostTensor> mask_, sinks_, slopes_;
    TensorView mask_result_, sinks_result_, slopes_result_;
};

}  // namespace

std::string missing_sum_text(const BackwardProblem& problem) {
    if (problem.forward.query.view.device == Device::cpu) return {};
    for (const Gradient gradient : {Gradient::query, Gradient::key, Gradient::value})
        if (problem.wants(gradient) && problem.broadcasts(gradient))
            return std::string(name_of(gradient)) +
                   " of a tensor that broadcasts is not implemented in GPU memory";
    if (problem.forward.ndim > 4)
        return "a backward pass with several batch dimensions is not implemented in GPU memory";
    return {};
}

void with_sums(const BackwardProblem& problem, const BackwardResults& results, const Run& run) {
    BackwardResults own = results;
    const FullGradients full(problem, own);
    const bool shares = own.mask || own.sinks || own.alibi_slopes;
    if (!shares || part_count(problem, own) <= 1) {
        for_each_part(problem, own, run);
    } else {
        const PartSums sums(own);
        for_each_part(problem, own,
                      [&](const BackwardProblem& part, const BackwardResults& written) {
                          sums.run(part, written, run);
                      });
        sums.finish();
    }
    full.finish();
}

}  // namespace umfa
