// Launches of the full-length kernel: the tiles that fit a problem and a GPU.
#pragma once

#include <string>
#include <vector>

#include "core/export.h"
#include "metal/launch_builder.h"

namespace umfa::metal {

/// A row of forward_shapes.h, perhaps with fewer simdgroups.
struct Tiles {
    int d, dv, bk, qf, simdgroups, split;
    bool one_tile;
    int fences;          // where loads stay, as forward_shapes.h says
    std::string kernel;  // its name

    /// Of a threadgroup.
    int rows() const { return 8 * qf * simdgroups / split; }
};

Tiles tiles_of(const Problem& problem, const Capabilities& gpu);

/// The kernels among which tuning chooses on a GPU: one list for each dtype and head dims, the default
/// first.
UMFA_CORE_API std::vector<std::vector<std::string>> tile_choices(const Capabilities& gpu);
/// Whether tuning may choose this kernel, on some GPU.
bool is_tile_choice(const std::string& kernel);

/// The launch without its grid, sequences and what splits need.
LaunchBuilder tile_launch(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                          const Capabilities& gpu, const Tiles& tiles);

/// The work of a threadgroup whose rows read so many keys, in seconds of one core.
double tile_seconds(const Problem& problem, const Tiles& tiles, double keys,
                    const Capabilities& gpu);

}  // namespace umfa::metal
