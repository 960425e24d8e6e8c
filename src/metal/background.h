// Compiling kernels while the CPU runs the call that needs them.
#pragma once

#include "core/problem.h"

namespace umfa::metal {

/// Whether the CPU should run this call. If so, its kernels are compiled and its dtypes tested in the
/// background.
///
/// The rule depends on the calls before this one and not on time: a call runs on the CPU if no
/// earlier one needed some of its kernels; the next one waits for them. A call that would take the
/// CPU longer than compiling takes is not postponed.
bool postpone_forward(const Problem& problem);

/// Floating-point operations of a call.
double flop_of(const Problem& problem);

/// Whether a thread compiles.
bool compiles_in_background();
/// Waits until no thread compiles, but not for long.
void wait_for_background();

}  // namespace umfa::metal
