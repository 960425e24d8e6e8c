// What the core asks of a backend. Routing reads these tables; there is no other list of features.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/problem.h"

namespace umfa {

/// An answer with its reason: empty when yes.
struct Verdict {
    bool yes = true;
    std::string reason;
};

struct Backend {
    const char* name;
    uint32_t features;        // bitwise or of `Feature`s
    Verdict (*available)();   // is it there at all, on this machine and in this build
    bool (*can_see)(Device);  // can it read tensors on that device
    Verdict (*can_forward)(const Problem&);  // what features do not say; null: everything
    bool (*worthwhile)(const Problem&);      // may "auto" choose it before others; null: always
    void (*forward)(const Problem&);

    // Of a backend whose device is not the CPU; else null.
    /// Records the work in the caller's stream (an id<MTLCommandBuffer>), and neither commits it nor
    /// waits. The tensors' memory must stay until the stream has run.
    void (*encode_forward)(const Problem&, void* stream) = nullptr;
    /// Memory that `TensorView::data` can name on the device; throws `Error` when there is none.
    void* (*allocate)(uint64_t bytes, std::string_view function) = nullptr;
    void (*deallocate)(void* memory) = nullptr;
    /// The device in words; empty when there is none.
    std::string (*describe)() = nullptr;
};

namespace cpu {
extern const Backend backend;
}
namespace metal {
extern const Backend backend;  // in builds that have it
}

}  // namespace umfa
