// Handing a call's launches to another library, which queues them in a stream of its own.
#pragma once

#include <cstdint>
#include <functional>

#include "core/launch_plan.h"

namespace umfa {

/// What became of a plan.
struct Played {
    bool done = false;
    /// Where it is not done: the most threads of a threadgroup that its kernels take, so that a plan
    /// with smaller ones may do; 0 if the stream takes no plan of this call.
    uint32_t max_threads = 0;
};

class Player {
public:
    virtual ~Player() = default;
    /// Queues all of the plan's launches, or none.
    virtual Played play(const metal::LaunchPlan& plan) = 0;
    /// Calls `run`, which computes before it returns what the stream did not take. What the stream
    /// has queued is done by then.
    virtual void instead(const std::function<void()>& run) = 0;
};

}  // namespace umfa
