// BackwardProblem: the gradients of one attention call. It holds the call itself, what the forward
// pass gave, and the gradients of that. Checked once by make(), as Problem is.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>

#include "core/export.h"
#include "core/problem.h"

namespace umfa {

/// What a gradient is taken with respect to.
enum class Gradient : uint8_t { query, key, value, qv, mask, sinks, alibi_slopes };
constexpr size_t gradient_count = 7;
constexpr uint32_t bit(Gradient gradient) { return 1u << static_cast<uint32_t>(gradient); }
/// "dq", "dk", "dv", "dqv", "dmask", "dsinks" or "dalibi_slopes".
UMFA_CORE_API const char* name_of(Gradient gradient);
/// The gradient of that name; nullopt if there is none.
UMFA_CORE_API std::optional<Gradient> gradient_named(std::string_view name);

/// What a binding hands to the core, none of it checked.
struct BackwardRequest {
    explicit BackwardRequest(const AttentionRequest& call) : attention(call) {}

    AttentionRequest attention;                // without out
    std::optional<TensorView> out, lse, dout;  // of the forward pass, and the gradient of out
    std::optional<TensorView> dlse;            // the gradient of lse; absent: 0
    uint32_t wanted = 0;                       // bitwise or of `Gradient`s
};

/// A gradient for each `Gradient`, those that are not wanted absent.
using Gradients = std::array<std::optional<TensorView>, gradient_count>;

/// What a backward pass writes: of the input's dtype, or float32. Present where it is wanted.
struct BackwardResults {
    std::optional<Operand> query, key, value, qv;
    std::optional<DenseMask> mask;      // in the mask's own shape, summed where the mask broadcasts
    std::optional<Sinks> sinks;         // (nheads,)
    std::optional<Alibi> alibi_slopes;  // (nheads,) or (batch, nheads)
};

struct UMFA_CORE_API BackwardProblem {
    using Results = BackwardResults;

    Problem forward;
    Operand out;                  // of the problem's out_dtype
    Operand lse;                  // f32, natural log; stride_channel unused
    Operand dout;                 // f32, f16 or bf16
    std::optional<Operand> dlse;  // f32
    uint32_t wanted = 0;

    /// Checks everything; throws `Error` with the offending values.
    static BackwardProblem make(const BackwardRequest& request);

    bool wants(Gradient gradient) const { return (wanted & bit(gradient)) != 0; }

    /// Shape that a gradient must have, with the dtype and device of what it belongs to.
    TensorView shape_of(Gradient gradient) const;

    /// A gradient of the mask as the backends write it.
    DenseMask mask_gradient(const TensorView& view) const;

    /// Checks the tensors to be written: all that are wanted, and no others. Throws `Error`.
    BackwardResults results(const Gradients& gradients) const;

    /// Bitwise or of `Feature`s that this problem uses.
    uint32_t features() const { return forward.features(); }

    /// Whether the gradient is summed over indices for which the tensor is the same one.
    bool broadcasts(Gradient gradient) const;
};

/// Splits the problem into parts whose batch has one stride in each tensor. Calls `run` for each.
UMFA_CORE_API void for_each_part(
    const BackwardProblem& problem, const BackwardResults& results,
    const std::function<void(const BackwardProblem&, const BackwardResults&)>& run);
/// How many parts that are.
UMFA_CORE_API int64_t part_count(const BackwardProblem& problem, const BackwardResults& results);

}  // namespace umfa
