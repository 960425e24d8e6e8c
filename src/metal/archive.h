// Compiled pipelines in the user's cache folder, so that later processes need not compile them again:
// an MTLBinaryArchive and a record of it for each pipeline. Nothing here is an error. Where a file is
// missing, damaged or cannot be written, the pipeline is compiled as if there were no folder.
#pragma once

#import <Metal/Metal.h>

#include <string>

#include "metal/device.h"

namespace umfa::metal {

/// One pipeline's place in the folder.
class PipelineArchive {
public:
    /// `pipeline`: everything that the pipeline depends on besides the GPU, the system and umfa.
    PipelineArchive(const Gpu& gpu, const std::string& pipeline);

    /// The stored pipeline; nil if there is none that can be used.
    id<MTLComputePipelineState> read(MTLComputePipelineDescriptor* descriptor) const;
    /// Compiles the pipeline into an archive, from which the descriptor then makes it. If that
    /// fails, the descriptor stays as it was. Nil: there is nothing to write.
    id<MTLBinaryArchive> compile(MTLComputePipelineDescriptor* descriptor) const;
    /// Stores the archive.
    void write(id<MTLBinaryArchive> archive) const;

private:
    const Gpu& gpu_;
    std::string key_, file_;  // no file: without its ending; empty: off, or no folder
};

}  // namespace umfa::metal
