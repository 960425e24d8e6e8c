// What umfa has done since it was loaded. Counters only grow; callers subtract two readings.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/export.h"

namespace umfa {

struct Stats {
    using Count = std::atomic<uint64_t>;
    Count cpu_calls{0}, metal_calls{0};        // carried out, or recorded in a caller's stream
    Count calls_while_compiling{0};            // of cpu_calls: first calls of kernels, see postpone
    Count tensors_in_place{0};                 // of Metal calls: read or written where they are
    Count tensors_copied{0}, bytes_copied{0};  // and those that were not
    Count pipelines{0};                        // built, of whichever source
    Count pipelines_from_text{0};              // of them, compiled from Metal text
    Count pipelines_from_archive{0};           // and those read from the user's cache folder
    Count command_buffers{0};                  // committed by umfa
    Count queues_replaced{0};                  // after a command buffer failed
    Count gpu_nanoseconds{0};                  // between start and end of umfa's command buffers
};

UMFA_CORE_API Stats& stats();

}  // namespace umfa
