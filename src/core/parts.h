// The orthogonal parts of a Problem, each checked by itself against what is known already.
#pragma once

#include "core/checks.h"
#include "core/problem.h"

namespace umfa {

// Place of a dimension from the last.
inline int row_of(Layout layout) { return layout == Layout::bshd ? 3 : 2; }
inline int head_of(Layout layout) { return layout == Layout::bshd ? 2 : 3; }

/// The view and its strides, except the batch stride, which merge_batch() sets.
Operand operand_of(const TensorView& view, Layout layout);

Alibi checked_alibi(const Checker& check, const Problem& problem, const AttentionRequest& request);
Sinks checked_sinks(const Checker& check, const Problem& problem, const AttentionRequest& request);
/// Second parts of query and key; the key's is the value.
Operand checked_qv(const Checker& check, const Problem& problem, const AttentionRequest& request);
/// The mask as (batch, nheads, seqlen_q, seqlen_kv), with stride 0 where it broadcasts; the batch is
/// left to merge_batch().
DenseMask broadcast_mask(const Checker& check, const Problem& problem, const TensorView& mask);
/// What the bytes of key or value mean, if its format is given. Sets `numbers` to the tensor, with the
/// shape of its numbers.
std::optional<QuantOperand> checked_codes(const Checker& check, const AttentionRequest& request,
                                          Field field, const std::optional<QuantFormat>& format,
                                          TensorView& numbers);
/// New rows of key and value, as one index of the batch after the other.
Append checked_append(const Checker& check, const Problem& problem,
                      const AttentionRequest& request);
Rotary checked_rotary(const Checker& check, const Problem& problem,
                      const AttentionRequest& request);
Dropout checked_dropout(const Checker& check, const AttentionRequest& request);

/// What must hold of a tensor that the call writes: that it has the shape, dtype and device of
/// `shape`, and shares no memory with what the problem reads.
void check_writable(const Checker& check, const Problem& problem, const TensorView& view,
                    const TensorView& shape, const std::string& name);

/// Sets `batch`, `loops` and the batch strides of the inputs.
void merge_batch(Problem& problem);

}  // namespace umfa
