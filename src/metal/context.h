// What lives as long as umfa uses the GPU: the device, a queue, pipelines, scratch.
#pragma once

#import <Metal/Metal.h>

#include <memory>
#include <mutex>
#include <string_view>

#include "core/backend.h"
#include "metal/device.h"
#include "metal/pipelines.h"
#include "metal/scratch.h"
#include "metal/self_test.h"

namespace umfa::metal {

class Context {
public:
    /// The process's, made by the first who asks. Throws `Error` when there is no usable GPU.
    static std::shared_ptr<Context> current(std::string_view caller);
    /// Whether current() would give one.
    static Verdict available();
    /// Forgets it: calls that run keep theirs, the next makes another.
    static void release();

    explicit Context(Gpu gpu);
    const Gpu& gpu() const { return gpu_; }
    /// The GPU's, with what is tuned.
    Capabilities capabilities();
    Tuned tuned();
    /// Throws `Error` if a value is out of range.
    void tune(const Tuned& tuned);
    PipelineCache& pipelines() { return pipelines_; }
    ScratchPool& scratch() { return scratch_; }
    SelfTests& self_tests() { return self_tests_; }

    /// The queue of umfa's own command buffers. Throws `Error`.
    id<MTLCommandQueue> queue(std::string_view caller);
    /// After an error Metal ignores whatever else is committed to a queue: the next call gets
    /// another one.
    void replace_queue(id<MTLCommandQueue> failed);

private:
    const Gpu gpu_;
    PipelineCache pipelines_;
    ScratchPool scratch_;
    SelfTests self_tests_;
    std::mutex lock_;
    Tuned tuned_;
    id<MTLCommandQueue> queue_ = nil;
};

}  // namespace umfa::metal
