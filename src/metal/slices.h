// Slices of long launches: macOS ends a command buffer that occupies the GPU for seconds, and until
// then the display stands still.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/export.h"
#include "core/launch_plan.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// What a threadgroup does.
struct Cost {
    double flop;
    double bytes;  // of device memory that no other threadgroup reads at about the same time
};

/// Time that one core takes for it, by the table in slices.cpp.
double core_seconds(const Cost& cost, const Capabilities& gpu);

/// The time that a slice, and a command buffer of umfa's own, may take: UMFA_METAL_SLICE_MS, or what
/// slices.cpp says. Throws `Error` where the variable is not a positive number.
double slice_seconds();

/// A part of a launch's grid.
struct GridSlice {
    Size3 origin{0, 0, 0}, size;
    double seconds = 0;  // estimated
};

/// Cuts a grid into slices of slice_seconds() at most, or of single threadgroups. Small grids are one
/// slice. A threadgroup takes `most` core seconds or less; those with the same x take `seconds(x)`.
std::vector<GridSlice> slices_of(const Size3& grid, double most, const Capabilities& gpu,
                                 const std::function<double(uint32_t x)>& seconds);

/// How many launches of the plan, from `first` on, are for one command buffer.
UMFA_CORE_API size_t launches_together(const LaunchPlan& plan, size_t first);

}  // namespace umfa::metal
