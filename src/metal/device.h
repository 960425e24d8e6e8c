// The GPU, and what it can do.
#pragma once

#import <Metal/Metal.h>

#include <optional>
#include <string>

#include "core/backend.h"
#include "metal/capabilities.h"

namespace umfa::metal {

struct Gpu {
    id<MTLDevice> device = nil;
    Capabilities capabilities;
    bool cores_assumed = true;  // by its name
    std::string name;           // "Apple M3 Max"
    std::string architecture;   // "applegpu_g15s"
    uint64_t max_buffer_bytes = 0, memory_bytes = 0;
};

/// The first GPU that umfa can use. When there is none, nullopt, and why in `reason`.
std::optional<Gpu> open_gpu(std::string& reason);

/// "Apple M3 Max (applegpu_g15s, Apple9, 40 cores, 48.0 GiB for the GPU)"; "40 cores assumed" where
/// the I/O registry does not say
std::string describe(const Gpu& gpu);

}  // namespace umfa::metal
