// Planner of the kernel that reads the tables of sequences where the host does not.
#pragma once

#include <cstdint>
#include <optional>

#include "core/launch_plan.h"
#include "core/problem.h"
#include "metal/capabilities.h"

namespace umfa::metal {

/// What the threadgroups of the kernel that attends do.
struct TaskShape {
    int64_t group = 1;         // rows of a query
    int64_t block = 1;         // rows of a threadgroup
    int64_t alignment = 1;     // of the first key that is split
    int64_t round = 1;         // keys that a split has a multiple of
    int64_t splits = 1;        // 1: keys are not split; else the caller's, or 0
    int64_t least_keys = 1;    // worth a split of their own
    int64_t threadgroups = 1;  // that fill the GPU
    int64_t most_splits = 1;   // of a sequence
    bool merges = false;       // there is a list of rows, too
};

/// What the kernel writes, in scratch memory.
struct TablePlaces {
    Binding places, tasks, rows, appends;
    std::optional<Binding> pages;
    int64_t task_count = 0, row_count = 0, append_count = 0;  // of the lists
};

/// Adds its launch to the plan, and that of the kernel that appends, if there are new rows. Requires
/// `problem.sequences.tables`.
TablePlaces plan_tables(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                        const Capabilities& gpu, const TaskShape& shape);

/// The tensors that it uses, for a plan's table.
void add_tables(LaunchPlan& plan, const Problem& problem);

/// Launches a kernel that clears all rows of out and lse, if tables say which queries there are.
void plan_clear_all(LaunchPlan& plan, const Problem& problem, const ForwardResults& results);

}  // namespace umfa::metal
