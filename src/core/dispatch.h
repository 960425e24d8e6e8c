// Routing: which backend runs a Problem, and why another does not.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/export.h"
#include "core/problem.h"
#include "core/self_test.h"

namespace umfa {

/// `name`, or where that is "auto" what the environment's UMFA_BACKEND makes of it. Throws `Error`
/// for a name that no backend has.
UMFA_CORE_API std::string backend_name(std::string_view name, std::string_view function);

/// `name`: "auto", "metal" or "cpu".
UMFA_CORE_API Verdict can_run(const Problem& problem, std::string_view name);
UMFA_CORE_API Verdict can_run(const CombineProblem& problem, std::string_view name);

/// The backend for the problem. Throws `Error` with can_run's reason when there is none.
UMFA_CORE_API const Backend& route(const Problem& problem, std::string_view name);
UMFA_CORE_API const Backend& route(const CombineProblem& problem, std::string_view name);

/// Whether can_run or route may test a device, or wait for a test in another thread. The caller
/// must then release locks that the device needs, such as the GIL.
UMFA_CORE_API bool routing_may_wait(const Problem& problem);
UMFA_CORE_API bool routing_may_wait(const CombineProblem& problem);

/// Runs the problem on `backend`, and counts the call.
UMFA_CORE_API void forward(const Backend& backend, const Problem& problem,
                           const ForwardResults& results);
UMFA_CORE_API void combine(const Backend& backend, const CombineProblem& problem,
                           const CombineResults& results);

/// Records the call in a caller's stream on the device of `name`, a backend that has streams.
/// Throws `Error` when it has none, or cannot run the problem.
UMFA_CORE_API void encode_forward(const Problem& problem, const ForwardResults& results,
                                  std::string_view name, void* stream);

/// The backend that can see `device`, for memory on it. Throws `Error` when there is none.
UMFA_CORE_API const Backend& backend_of(Device device, std::string_view function);

struct BackendInfo {
    std::string name;
    bool available;
    std::string reason;  // why not; or what the self-test excludes, if anything
    std::string device;  // in words, where the backend has one of its own
};
UMFA_CORE_API std::vector<BackendInfo> backends();

/// Outcomes of the self-tests. `run`: first tests each untested dtype, if UMFA_SELF_TEST allows it.
UMFA_CORE_API SelfTestReports self_tests(bool run);

/// Puts a Metal backend that another library brings into the routing; null takes it out again. For
/// the tests, whose Metal is a double, in a library of its own.
UMFA_CORE_API void set_metal_backend(const Backend* backend);

}  // namespace umfa
