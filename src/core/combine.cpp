#include "core/combine.h"

#include <algorithm>
#include <string>

#include "core/checks.h"
#include "core/constants.h"

namespace umfa {
namespace {

/// `partial`: the first dimension counts the parts. `channels`: the last one counts channels.
CombineOperand operand_of(const TensorView& view, bool partial, bool packed, bool channels) {
    int dimension = 0;
    const auto next = [&](bool there) -> int64_t {
        if (!there) return 0;
        const int i = dimension++;
        return view.shape[i] == 1 ? 0 : view.strides[i];
    };
    CombineOperand operand{view};
    operand.stride_part = next(partial);
    operand.stride_batch = next(!packed);
    operand.stride_row = next(true);
    operand.stride_head = next(true);
    operand.stride_channel = next(channels);
    return operand;
}

bool same_shape(const TensorView& a, const TensorView& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

void check_out_partial(const Checker& check, const TensorView& view) {
    check_float_dtype(check, view, "out_partial");
    if ((view.ndim != 4 && view.ndim != 5) || view.shape[0] < 1)
        check.value("out_partial has the wrong shape", shape_text(view),
                    "(parts, batch, seqlen_q, nheads, head_dim) or (parts, total_q, nheads, "
                    "head_dim), at least one part");
    const int64_t head_dim = view.shape[view.ndim - 1];
    const std::string got = std::to_string(head_dim);
    const std::string expected = "1 to " + std::to_string(max_head_dim_v);
    if (head_dim < 1) check.value("head_dim of out_partial is too small", got, expected);
    if (head_dim > max_head_dim_v)
        check.unsupported("head_dim of out_partial is too large", got, expected);
    // Expanded tensors can ask for more elements than 64 bits count.
    int64_t elements = 1;
    bool fits = true;
    for (int i = 0; i < view.ndim; ++i)
        fits = fits && !__builtin_mul_overflow(elements, view.shape[i], &elements);
    if (!fits) check.value("out_partial is too large", shape_text(view), "less than 2^63 elements");
    check_memory(check, view, "out_partial");
}

void check_lse_partial(const Checker& check, const TensorView& view,
                       const TensorView& out_partial) {
    TensorView expected = out_partial;
    --expected.ndim;
    if (!same_shape(view, expected))
        check.value("lse_partial has the wrong shape", shape_text(view), shape_text(expected));
    if (view.dtype != DType::f32)
        check.type("lse_partial has the wrong dtype", name_of(view.dtype), name_of(DType::f32));
    check_same_device(check, view, "lse_partial", out_partial);
    check_memory(check, view, "lse_partial");
}

}  // namespace

CombineProblem CombineProblem::make(const CombineRequest& request) {
    const Checker check{request.function};
    const TensorView& given = request.out_partial;
    check_out_partial(check, given);
    check_lse_partial(check, request.lse_partial, given);
    CombineProblem problem;
    problem.function = request.function;
    problem.packed = given.ndim == 4;
    static const std::string out_dtype = "out_dtype", out = "out";
    problem.out_dtype =
        checked_out_dtype(check, {request.out_dtype, out_dtype}, {request.out, out}, given.dtype);
    problem.out_partial = operand_of(given, true, problem.packed, true);
    problem.lse_partial = operand_of(request.lse_partial, true, problem.packed, false);
    problem.parts = given.shape[0];
    problem.batch = problem.packed ? 1 : given.shape[1];
    problem.seqlen_q = size_at(given, 3);
    problem.nheads = size_at(given, 2);
    problem.head_dim = size_at(given, 1);
    if (request.out) problem.check_result(*request.out, problem.out_shape(), "out");
    return problem;
}

TensorView CombineProblem::out_shape() const {
    TensorView shape = out_partial.view;
    --shape.ndim;
    std::copy_n(out_partial.view.shape + 1, shape.ndim, shape.shape);
    shape.dtype = out_dtype;
    return shape;
}

TensorView CombineProblem::lse_shape() const {
    TensorView shape = out_shape();
    --shape.ndim;
    shape.dtype = DType::f32;
    return shape;
}

void CombineProblem::check_result(const TensorView& view, const TensorView& shape,
                                  const char* name) const {
    const Checker check{function};
    const std::string called = name;
    if (!same_shape(view, shape))
        check.value(called + " has the wrong shape", shape_text(view), shape_text(shape));
    if (view.dtype != shape.dtype)
        check.type(called + " has the wrong dtype", name_of(view.dtype), name_of(shape.dtype));
    check_same_device(check, view, called, shape);
    check_memory(check, view, called);
    check_distinct(check, view, called);
    check_overlap(check, view, called, out_partial.view, "out_partial");
    check_overlap(check, view, called, lse_partial.view, "lse_partial");
}

CombineResults CombineProblem::results(const TensorView& out, const TensorView& lse) const {
    check_result(out, out_shape(), "out");
    check_result(lse, lse_shape(), "lse");  // C's name: Python allocates it
    check_both_written(Checker{function}, lse, "lse", out, "out");
    return {operand_of(out, false, packed, true), operand_of(lse, false, packed, false)};
}

}  // namespace umfa
