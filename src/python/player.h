// LaunchPlans played by a Python function.
#pragma once

#include <nanobind/nanobind.h>

#include "core/player.h"
#include "python/running.h"

namespace umfa::python {

/// The plan as plain values.
nb::dict plan_dict(const metal::LaunchPlan& plan);

/// Calls `play(plan)` with the GIL, which the caller holds. It returns None, or max_threads.
class PythonPlayer : public Player {
public:
    explicit PythonPlayer(nb::handle play) : play_(play) {}
    Played play(const metal::LaunchPlan& plan) override {
        const nb::object result = play_(plan_dict(plan));
        if (result.is_none()) return {true, 0};
        return {false, nb::cast<uint32_t>(result)};
    }
    void instead(const std::function<void()>& run) override { without_gil(run); }

private:
    nb::handle play_;
};

}  // namespace umfa::python
