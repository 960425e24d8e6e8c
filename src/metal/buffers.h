// The tensors of a LaunchPlan as Metal buffers. Those on kDLMetal are buffers already. Those in host
// memory are mapped where they are, by whole pages; only what Metal cannot map is copied.
#pragma once

#import <Metal/Metal.h>

#include <string_view>
#include <vector>

#include "core/launch_plan.h"
#include "metal/device.h"

namespace umfa::metal {

class Operands {
public:
    enum class Copies { allowed, refused };

    /// Throws `Error` for what Metal can neither use, map nor (where allowed) hold a copy of. The
    /// plan and `caller` must outlive this.
    Operands(const LaunchPlan& plan, std::string_view caller, const Gpu& gpu, Copies copies);

    struct Bound {
        id<MTLBuffer> buffer = nil;
        NSUInteger offset = 0;
    };
    /// Where a binding to a tensor of the plan is.
    Bound bound(const Binding& binding) const;

    /// Copies results back to the caller's memory. Call it after the GPU has finished.
    void copy_back() const;

private:
    struct Operand {
        const PlanTensor* tensor = nullptr;
        bool copied = false;
        id<MTLBuffer> buffer = nil;
        uint64_t first = 0;          // bytes from the start of the buffer to the first element
        int64_t begin = 0, end = 0;  // bytes it reaches, from its first element
        const TensorView& view() const { return tensor->view; }
        uintptr_t address() const { return reinterpret_cast<uintptr_t>(view().address()); }
    };

    void use_metal_buffer(Operand& operand) const;
    void map_host_memory(std::vector<Operand*>& operands);
    void copy_in(Operand& operand) const;

    const std::string_view caller_;
    const Gpu& gpu_;
    const Copies copies_;
    std::vector<Operand> operands_;    // as the plan's tensors
    id<MTLBuffer> placeholder_ = nil;  // for tensors without elements
};

}  // namespace umfa::metal
