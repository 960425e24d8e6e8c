// Quantising a tensor, and the way back. Each is checked once by make(), as Problem is.
#pragma once

#include <optional>
#include <string_view>

#include "core/export.h"
#include "core/quant_operand.h"

namespace umfa {

/// What a binding hands to the core, none of it checked.
struct QuantizeRequest {
    std::string_view function;  // its name, for messages; outlives the QuantizeProblem
    TensorView x;
    QuantFormat format;
    Layout layout = Layout::bshd;
    bool allow_nonfinite = false;
};

/// What quantising writes. Strides as in QuantOperand.
struct QuantizeResults {
    Operand data, scales;
    std::optional<Operand> zero_points;
};

struct UMFA_CORE_API QuantizeProblem {
    using Results = QuantizeResults;

    std::string_view function;
    Operand x;
    QuantFormat format;
    QuantSizes sizes;
    /// A block with a NaN or an infinity, or whose scale is out of range, gets a scale of NaN. Without
    /// this, `run` throws in its place.
    bool allow_nonfinite = false;

    /// Checks everything but the numbers; throws `Error` with the offending values.
    static QuantizeProblem make(const QuantizeRequest& request);

    /// Checks the tensors to be written. Throws `Error`.
    QuantizeResults results(const TensorView& data, const TensorView& scales,
                            const std::optional<TensorView>& zero_points) const;

    TensorView data_shape() const { return sizes.data_shape(format, x.view); }
    TensorView scales_shape() const { return *sizes.scales_shape(format, x.view); }
    std::optional<TensorView> zero_points_shape() const {
        return sizes.offsets_shape(format, x.view);
    }

    /// Throws the `Error` about a block without a scale. `block`: its number among all, channel blocks
    /// fastest. `finite`: it has neither NaN nor an infinity, so its numbers are too large.
    [[noreturn]] void refuse(int64_t block, bool finite) const;
};

struct DequantizeRequest {
    std::string_view function;  // as above
    TensorView data;
    Quantization quantization;
    Layout layout = Layout::bshd;
    DType out_dtype = DType::f32;
};

struct DequantizeResults {
    Operand out;
};

struct UMFA_CORE_API DequantizeProblem {
    using Results = DequantizeResults;

    std::string_view function;
    QuantOperand operand;
    DType out_dtype = DType::f32;

    /// Checks everything; throws `Error` with the offending values.
    static DequantizeProblem make(const DequantizeRequest& request);
    /// Checks the tensor to be written. Throws `Error`.
    DequantizeResults results(const TensorView& out) const;
    TensorView out_shape() const;
};

}  // namespace umfa
