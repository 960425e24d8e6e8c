// Families of kernels: those that the self-test takes for one, and that it excludes together.
// families_of() is in core/instruments.h.
#pragma once

#include <string_view>

#include "core/instruments.h"

namespace umfa::metal {

/// Whether kernels of the family hold 8x8 matrices, so that they rely on the map of lanes.
bool has_matrices(std::string_view family);

}  // namespace umfa::metal
