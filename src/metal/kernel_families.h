// Kernel families: groups of kernels that the self-test tests by one case and excludes together.
// families_of() is in core/instruments.h.
#pragma once

#include <string_view>

#include "core/instruments.h"

namespace umfa::metal {

/// Whether the family's kernels use 8x8 matrices, and so rely on the lane map.
bool has_matrices(std::string_view family);

}  // namespace umfa::metal
