// What the planner needs to know of a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tuning.h"

namespace umfa::metal {

/// Apple's GPU families; M1 = apple7, M2 = apple8, M3 and M4 = apple9, M5 = apple10.
enum class Family : uint8_t { apple7 = 7, apple8 = 8, apple9 = 9, apple10 = 10 };

struct Capabilities {
    Family family = Family::apple7;
    int cores = 8;
    uint32_t max_threadgroup_bytes = 32768;
    uint32_t max_threads = 1024;
    int64_t decode_threadgroups_per_core = Tuning{}.decode_threadgroups_per_core;
    std::vector<std::string> tiles = {};  // as Tuning has them

    /// bfloat arithmetic is native from Apple9 on; before, fragments of bfloat become float.
    bool native_bfloat() const { return family >= Family::apple9; }
};

}  // namespace umfa::metal
