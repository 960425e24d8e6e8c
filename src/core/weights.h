// The attention weights as a matrix, for looking at small problems.
//
// They are what attention gives of values that are the columns of an identity matrix, so the matrix
// shows what the kernels do. Where dropout makes them 0, it has dropped them.
#pragma once

#include "core/dispatch.h"
#include "core/export.h"
#include "core/problem.h"

namespace umfa {

/// Throws `Error` where the weights of the call cannot be returned.
UMFA_CORE_API void check_weights(const Problem& problem);

/// The problem of a call that computes weights only and needs no value. Checked as
/// Problem::make() and check_weights() do.
UMFA_CORE_API Problem make_weights_problem(AttentionRequest request);

/// Shape, dtype and device of the matrix: (batch, nheads, longest seqlen_q, longest seqlen_kv), of
/// query's dtype.
UMFA_CORE_API TensorView weights_shape(const Problem& problem);

/// What weights() runs, for the routing; with `runs_call`, beside the call itself. Requires
/// check_weights(problem). `problem` outlives it.
UMFA_CORE_API Steps weights_steps(const Problem& problem, bool runs_call);

/// Writes the weights as they are before dropout, negative where it drops, 0 for pairs of query and
/// key that are not there. Besides the matrix it takes memory for 512 keys of one sequence.
/// Requires check_weights(problem), and a backend that can run weights_steps().
UMFA_CORE_API void weights(const Backend& backend, const Problem& problem,
                           const TensorView& matrix);

}  // namespace umfa
