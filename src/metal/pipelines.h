// Pipelines: kernels specialised with their constants and compiled for this GPU, kept by name and
// constants.
#pragma once

#import <Metal/Metal.h>

#include <string_view>

#include "metal/build_once.h"
#include "metal/library.h"

namespace umfa::metal {

struct Pipeline {
    id<MTLComputePipelineState> state = nil;
    uint32_t max_threads = 0, threadgroup_bytes = 0;
};

class PipelineCache {
public:
    /// The pipeline of a launch; throws `Error`. Its limits are the caller's to look at. `built`
    /// counts those that the cache did not have.
    Pipeline get(const Gpu& gpu, const KernelLaunch& launch, std::string_view caller,
                 int64_t* built = nullptr);

    /// Whether an earlier call needed the launch's pipeline, or claimed it.
    bool claim(const KernelLaunch& launch);

private:
    Libraries libraries_;
    BuildOnce<Pipeline> pipelines_;
};

}  // namespace umfa::metal
