#import "metal/pipelines.h"

#include "core/stats.h"
#import "metal/archive.h"
#include "metal/kernel_text.h"
#import "metal/text.h"

namespace umfa::metal {
namespace {

std::string key_of(const KernelLaunch& launch) {
    std::string key = launch.kernel + "\n" + kernel_defines(launch);
    for (const Constant& constant : launch.constants)
        key += std::to_string(constant.index) + ":" + std::to_string(constant.value) + "\n";
    return key;
}

Pipeline build(Libraries& libraries, const Gpu& gpu, const KernelLaunch& launch,
               std::string_view caller) {
    const Libraries::Function found = libraries.function_of(gpu, launch, caller);
    MTLComputePipelineDescriptor* descriptor = [MTLComputePipelineDescriptor new];
    descriptor.label = ns_string(launch.kernel);
    descriptor.computeFunction = found.function;
    descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth = YES;
    const PipelineArchive archive(gpu, key_of(launch));
    id<MTLComputePipelineState> state = archive.read(descriptor);
    if (state) {
        ++stats().pipelines_from_archive;
    } else {
        id<MTLBinaryArchive> compiled = archive.compile(descriptor);
        NSError* error = nil;
        state = [gpu.device newComputePipelineStateWithDescriptor:descriptor
                                                          options:MTLPipelineOptionNone
                                                       reflection:nil
                                                            error:&error];
        if (!state)
            fail(ErrorKind::device, caller, "Metal could not build the kernel " + launch.kernel,
                 text_of(error), "a pipeline; report this as a bug");
        if (compiled) archive.write(compiled);
    }
    if (state.threadExecutionWidth != 32)
        fail(ErrorKind::unsupported, caller, "this GPU's simdgroups have another size",
             std::to_string(state.threadExecutionWidth), "32 threads");
    ++stats().pipelines;
    if (found.from_text) ++stats().pipelines_from_text;
    return {state, static_cast<uint32_t>(state.maxTotalThreadsPerThreadgroup),
            static_cast<uint32_t>(state.staticThreadgroupMemoryLength)};
}

}  // namespace

Pipeline PipelineCache::get(const Gpu& gpu, const KernelLaunch& launch, std::string_view caller,
                            int64_t* built) {
    return pipelines_.get(
        key_of(launch), [&] { return build(libraries_, gpu, launch, caller); }, built);
}

bool PipelineCache::claim(const KernelLaunch& launch) { return pipelines_.claim(key_of(launch)); }

}  // namespace umfa::metal
