// The tensors of a Problem as Metal buffers. Those on kDLMetal are buffers already. Those in host
// memory are mapped where they are, by whole pages; only what Metal cannot map is copied.
#pragma once

#import <Metal/Metal.h>

#include <array>
#include <vector>

#include "core/problem.h"
#include "metal/device.h"
#include "metal/launch_plan.h"

namespace umfa::metal {

class Operands {
public:
    enum class Copies { allowed, refused };

    /// Throws `Error` for what Metal can neither use, map nor (where allowed) hold a copy of.
    Operands(const Problem& problem, const Gpu& gpu, Copies copies);

    struct Bound {
        id<MTLBuffer> buffer = nil;
        NSUInteger offset = 0;
    };
    /// Where a binding of the plan is; its source is a tensor.
    Bound bound(const Binding& binding) const;

    /// Brings copied results home. After the GPU has finished.
    void copy_back() const;

private:
    struct Operand {
        const TensorView* view = nullptr;
        bool read = true, written = false, copied = false;
        id<MTLBuffer> buffer = nil;
        uint64_t first = 0;          // bytes from the start of the buffer to the first element
        int64_t begin = 0, end = 0;  // bytes it reaches, from its first element
        uintptr_t address() const { return reinterpret_cast<uintptr_t>(view->address()); }
    };

    void use_metal_buffer(Operand& operand, const char* name) const;
    void map_host_memory(std::vector<Operand*>& operands);
    void copy_in(Operand& operand) const;

    const Problem& problem_;
    const Gpu& gpu_;
    const Copies copies_;
    std::array<Operand, 24> operands_;  // by Binding::Source
    id<MTLBuffer> placeholder_ = nil;   // for tensors without elements
};

}  // namespace umfa::metal
