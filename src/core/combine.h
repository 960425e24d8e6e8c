// CombineProblem: partial results of attention over parts of the keys, to be merged into the result
// over all of them. Checked once by make(), as Problem is.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "core/export.h"
#include "core/tensor_view.h"

namespace umfa {

/// What a binding hands to the core, none of it checked.
struct CombineRequest {
    std::string_view function;  // its name, for messages; outlives the CombineProblem
    TensorView out_partial, lse_partial;
    std::optional<DType> out_dtype;  // absent: out's, or else out_partial's
    std::optional<TensorView> out;   // may be absent in can_run
};

/// A tensor of the problem: strides in elements, 0 for dimensions that it lacks.
struct CombineOperand {
    TensorView view;  // in the caller's shape
    int64_t stride_part = 0, stride_batch = 0, stride_row = 0, stride_head = 0, stride_channel = 0;
};

/// What a merge writes.
struct CombineResults {
    CombineOperand out, lse;
};

struct UMFA_CORE_API CombineProblem {
    using Results = CombineResults;

    std::string_view function;
    int64_t parts = 0, batch = 0, seqlen_q = 0, nheads = 0, head_dim = 0;
    bool packed = false;  // the tensors have no batch dimension; batch is 1
    CombineOperand out_partial, lse_partial;
    DType out_dtype = DType::f32;

    /// Checks everything; throws `Error` with the offending values.
    static CombineProblem make(const CombineRequest& request);

    /// Checks the tensors to be written: those of out_shape() and lse_shape(). Throws `Error`.
    CombineResults results(const TensorView& out, const TensorView& lse) const;

    /// Shape, dtype and device that they must have.
    TensorView out_shape() const;
    TensorView lse_shape() const;

private:
    void check_result(const TensorView& view, const TensorView& shape, const char* name) const;
};

}  // namespace umfa
