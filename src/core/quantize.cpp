#include "core/quantize.h"

#include <string>

namespace umfa {
namespace {

/// What must hold of a tensor that is written, beyond check_like().
void check_written(const Checker& check, const TensorView& view, const std::string& name,
                   const TensorView& read, const std::string& other) {
    check_distinct(check, view, name);
    check_overlap(check, view, name, read, other);
}

}  // namespace

QuantizeProblem QuantizeProblem::make(const QuantizeRequest& request) {
    const Checker check{request.function};
    check_float_dtype(check, request.x, "x");
    request.format.check(check, true);
    QuantizeProblem problem;
    problem.function = request.function;
    problem.format = request.format;
    problem.allow_nonfinite = request.allow_nonfinite;
    problem.sizes = QuantSizes::make(check, request.x, "x", request.format, request.layout,
                                     size_at(request.x, 1));
    check_memory(check, request.x, "x");
    problem.x = strided_operand(request.x, request.layout);
    return problem;
}

QuantizeResults QuantizeProblem::results(const TensorView& data, const TensorView& scales,
                                         const std::optional<TensorView>& zero_points) const {
    const Checker check{function};
    check_like(check, data, data_shape(), "data");
    if (stride_at(data, 1) > 1 || stride_at(data, 1) < 0)
        check.value("the last dimension of data is not contiguous",
                    "stride " + std::to_string(stride_at(data, 1)), "stride 1");
    check_written(check, data, "data", x.view, "x");
    check_like(check, scales, scales_shape(), "scales");
    check_written(check, scales, "scales", x.view, "x");
    check_both_written(check, scales, "scales", data, "data");
    const auto shape = zero_points_shape();
    if (zero_points.has_value() != shape.has_value())
        check.value(
            zero_points ? "zero_points are given" : "zero_points are missing",
            zero_points ? "a tensor" : "None",
            shape ? "a tensor of shape " + shape_text(*shape) : "None: this format has none");
    QuantizeResults results{
        strided_operand(data, sizes.layout), strided_operand(scales, sizes.layout), {}};
    if (zero_points) {
        check_like(check, *zero_points, *shape, "zero_points");
        check_written(check, *zero_points, "zero_points", x.view, "x");
        check_both_written(check, *zero_points, "zero_points", data, "data");
        check_both_written(check, *zero_points, "zero_points", scales, "scales");
        results.zero_points = strided_operand(*zero_points, sizes.layout);
    }
    return results;
}

void QuantizeProblem::refuse(int64_t block, bool finite) const {
    const int64_t blocks = sizes.channel_blocks(), rows = sizes.row_blocks();
    const std::string got =
        sizes.one_block
            ? "one"
            : "one in block (batch " + std::to_string(block / blocks / rows / sizes.heads) +
                  ", head " + std::to_string(block / blocks / rows % sizes.heads) + ", row block " +
                  std::to_string(block / blocks % rows) + ", channel block " +
                  std::to_string(block % blocks) + ")";
    if (finite)
        fail(ErrorKind::value, function, "x has a number that is too large for float16 scales", got,
             "smaller numbers, scale_dtype='float32', or nonfinite='nan'");
    fail(ErrorKind::value, function, "x has a NaN or an infinity", got,
         "finite numbers, or nonfinite='nan'");
}

DequantizeProblem DequantizeProblem::make(const DequantizeRequest& request) {
    const Checker check{request.function};
    DequantizeProblem problem;
    problem.function = request.function;
    problem.out_dtype = request.out_dtype;
    if (!is_attention_dtype(request.out_dtype))
        check.type("dtype is not one that umfa computes on", name_of(request.out_dtype),
                   "float32, float16 or bfloat16");
    problem.operand =
        QuantOperand::make(check, request.data, "data", request.quantization, request.layout);
    return problem;
}

TensorView DequantizeProblem::out_shape() const {
    TensorView shape = operand.data.view;
    shape.shape[shape.ndim - 1] = operand.sizes.channels;
    shape.dtype = out_dtype;
    shape.data = nullptr;
    shape.byte_offset = 0;
    return shape;
}

DequantizeResults DequantizeProblem::results(const TensorView& out) const {
    const Checker check{function};
    check_like(check, out, out_shape(), "out");
    check_written(check, out, "out", operand.data.view, "data");
    if (operand.scales) check_overlap(check, out, "out", operand.scales->view, "scales");
    if (operand.offsets) check_overlap(check, out, "out", operand.offsets->view, "zero_points");
    return {strided_operand(out, operand.sizes.layout)};
}

}  // namespace umfa
