// What the core asks of a backend. Routing reads these tables; there is no other list of features.
#pragma once

#include <cstdint>
#include <string>

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
    void (*forward)(const Problem&);
};

namespace cpu {
extern const Backend backend;
}

}  // namespace umfa
