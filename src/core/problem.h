// Problem: what one attention call computes, normalised and checked. Bindings fill an
// AttentionRequest, make() checks everything once, and the Problem does not change after that. The
// tensors to write are a separate ForwardResults.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/constants.h"
#include "core/export.h"
#include "core/operand.h"
#include "core/request.h"
#include "core/sequences.h"
#include "core/tensor_view.h"
#include "shared/philox.h"
#include "shared/visible.h"

namespace umfa {

constexpr int64_t max_seqlen = INT32_MAX;  // kernels hold key positions in 32 bits

// ---- the orthogonal parts ------------------------------------------------------------------------
// Each is absent (nullopt) or there; any two compose. A backend that lacks one says so by name in
// can_run (see Feature). Tensors of size 1 in a broadcast dimension carry stride 0.

/// Dense mask, broadcast to (batch, nheads, seqlen_q, seqlen_kv) by stride 0 and never expanded.
/// b8: true = attend. Float: added to the scores after softmax_scale.
struct DenseMask {
    TensorView view;   // 4-D
    TensorView given;  // the same memory in the caller's shape
};

/// Position-dependent bias -slope * |i + seqlen_kv - seqlen_q - j|, Press et al. 2022.
struct Alibi {
    TensorView view;  // f32
    int64_t stride_batch = 0, stride_head = 0;
};

/// One extra softmax column per head with a natural-log logit and no value row.
struct Sinks {
    TensorView logits;  // (nheads,): f32, f16 or bf16
};

/// Rows that go into key and value before attention; `sequences` says which.
struct Append {
    Operand key, value;
};

/// Rotary position embedding, Su et al. 2021. The first `channels` of a row are rotated.
struct Rotary {
    TensorView cos, sin;  // (positions, channels / 2)
    int64_t channels = 0;
    bool interleaved = true;
    bool advances = true;  // query i has the first query's position + i; else all have the first's
    bool keys = false;     // key j is rotated too, by the angles of position j
};

/// Counter-based dropout of the probabilities; what is kept is divided by 1 - p. shared/philox.h says
/// what is dropped: it depends on the indices of batch, head, query and key alone.
struct Dropout {
    double p = 0;
    PhiloxKey key{};
    uint32_t threshold = 0;  // p * 2^32
    // Index b of the problem's batch is index first + b * step of all batch dimensions as one.
    int64_t batch_first = 0, batch_step = 1;
};

// ---- features: what a problem asks of a backend ----------------------------------------------------

enum class Feature : uint32_t {
    causal = 1u << 0,
    window = 1u << 1,
    softcap = 1u << 2,
    alibi = 1u << 3,
    lse = 1u << 4,
    gqa = 1u << 5,
    mask = 1u << 6,
    sinks = 1u << 7,
    varlen = 1u << 10,
    paged_kv = 1u << 11,
    dropout = 1u << 12,
    attention_chunk = 1u << 14,
    append = 1u << 15,
    rotary = 1u << 16,
    qv = 1u << 17,
    quantized = 1u << 18,
    quant_mode = 1u << 19,
};
constexpr uint32_t bit(Feature feature) { return static_cast<uint32_t>(feature); }
/// The name users know it by: "window_size", "dropout_p", ...
UMFA_CORE_API const char* name_of(Feature feature);

// ---- problem -------------------------------------------------------------------------------------

/// A batch dimension that cannot be merged with the others into one stride. The problem runs once
/// for each index; these strides move the tensors, in the order in which batches.cpp lists them.
struct BatchLoop {
    static constexpr int most_tensors = 12;
    int64_t size = 1;
    int64_t strides[most_tensors] = {};
    int64_t index = 0;  // of all batch dimensions as one
};

/// Rows [row, row + rows) of one index of the batch.
struct RowRange {
    int64_t batch, row, rows;
};

/// What a forward pass writes.
struct ForwardResults {
    Operand out;                 // of the problem's out_dtype
    std::optional<Operand> lse;  // f32, natural log; stride_channel unused
};

struct UMFA_CORE_API Problem {
    using Results = ForwardResults;

    std::string_view function;        // its name, for messages
    const Function* names = nullptr;  // the caller's spelling of the arguments; outlives this
    Layout layout = Layout::bshd;
    int ndim = 4;  // of out; less than 4 where it has no batch dimension, or no nheads
    int64_t batch_shape[TensorView::max_ndim] = {};  // its first ndim - 3 dimensions
    // They count as one, `batch`, as far as strides allow; the others are loops, outermost first.
    std::vector<BatchLoop> loops;
    int64_t batch = 0, nheads_q = 0, nheads_kv = 0;
    int64_t seqlen_q = 0, seqlen_kv = 0;  // the longest, where sequences differ
    int64_t query_rows = 0;               // of the tensor: seqlen_q, or of all packed sequences
    int64_t head_dim = 0, head_dim_v = 0;
    Operand query, key, value;
    // What the bytes of key and value mean. `key` and `value` then hold these bytes.
    std::optional<QuantOperand> key_codes, value_codes;
    std::optional<Operand> qv;  // the part of the queries that meets the values
    DType out_dtype = DType::f32;
    bool wants_lse = false;
    double softmax_scale = 1;
    // Of the longest, without a prefix.
    Visible<int64_t> visible{0, 0, UMFA_UNBOUNDED, UMFA_UNBOUNDED, 0, 0, 0};
    bool causal = false, top_left = false;
    double softcap = 0;            // 0: off
    int64_t num_splits = 0;        // as in the request
    bool batch_invariant = false;  // one way for few and for many queries
    QuantMode quant_mode = QuantMode::none;
    bool smooth_k = true;  // with a quant_mode

    std::optional<Alibi> alibi;
    std::optional<DenseMask> mask;
    std::optional<Sinks> sinks;
    Sequences sequences;    // not given: index b of the batch is sequence b, all of it
    int64_t page_size = 0;  // > 0: keys and values lie in pages
    std::optional<Append> append;
    std::optional<Rotary> rotary;
    std::optional<Dropout> dropout;

    /// Checks everything; throws `Error` with the offending values.
    static Problem make(const AttentionRequest& request);

    /// Checks the tensors to be written: those of out_shape() and, where there is one, lse_shape().
    /// Throws `Error`.
    ForwardResults results(const TensorView& out, const std::optional<TensorView>& lse = {}) const;

    /// Results as a call would allocate them, without memory: for a plan that is not run. `out` is
    /// the request's, if it has one.
    ForwardResults results_without_memory(const std::optional<TensorView>& out = {}) const;

    /// Where sequence b lies, and what its queries see.
    SequenceRows sequence(int64_t b) const;
    Visible<int64_t> visible_of(const SequenceRows& rows) const;

    /// Rows of out and lse that belong to no sequence: between packed ones, and past those in use.
    std::vector<RowRange> unused_rows() const;

    /// Shape that out must have, in `layout`, and the dtype and device; likewise lse.
    TensorView out_shape() const;
    TensorView lse_shape() const;

    /// Factor on q.k. Kernels use exp2, so it makes scores in units of log2; with softcap on it makes
    /// the argument of tanh, whose result softcap_log2() brings to units of log2.
    double score_scale() const;
    double softcap_log2() const;
    /// Whether query, key, value and out have the same dtype. If not, arithmetic is float32.
    bool one_dtype() const;
    /// Bitwise or of `Feature`s that this problem uses.
    uint32_t features() const;

private:
    ForwardResults results_in(const TensorView& out, const std::optional<TensorView>& lse) const;
};

/// Splits the problem into parts whose batch has one stride in each tensor. Calls `run` for each.
/// Most problems are one part.
UMFA_CORE_API void for_each_part(
    const Problem& problem, const ForwardResults& results,
    const std::function<void(const Problem&, const ForwardResults&)>& run);

}  // namespace umfa
