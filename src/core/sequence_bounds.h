// What the host knows of sequences whose tables lie on the GPU: how long they can be.
#pragma once

#include "core/sequences.h"

namespace umfa {

/// As read_sequences(), for tables that a kernel reads when it runs: `rows` are the longest that the
/// tensors, max_seqlen_q and max_seqlen_k allow. Throws `Error` for shapes and dtypes that do not
/// fit, and for calls that need the numbers before they run.
Sequences sequence_bounds(const AttentionRequest& request, const SequenceShapes& shapes);

}  // namespace umfa
