// Routing: which backend runs a Problem, and why another does not.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/export.h"
#include "core/problem.h"
#include "core/self_test.h"

namespace umfa {

/// A computation that takes several operations, all on one backend.
struct Steps {
    const Problem& call;    // says in whose name, and whether a GPU is worth its start
    std::string purpose;    // of the steps, for messages: "the weights"
    bool runs_call = true;  // the call itself is computed too
    std::vector<Problem> forwards;
    std::vector<CombineProblem> combines;
};

/// `name`, or where that is "auto" what the environment's UMFA_BACKEND makes of it. Throws `Error`
/// for a name that no backend has.
UMFA_CORE_API std::string backend_name(std::string_view name, std::string_view function);

/// `name`: "auto", "metal" or "cpu".
UMFA_CORE_API Verdict can_run(const Problem& problem, std::string_view name);
UMFA_CORE_API Verdict can_run(const CombineProblem& problem, std::string_view name);
UMFA_CORE_API Verdict can_run(const Steps& steps, std::string_view name);
UMFA_CORE_API Verdict can_run(const BackwardProblem& problem, std::string_view name);
UMFA_CORE_API Verdict can_run(const QuantizeProblem& problem, std::string_view name);
UMFA_CORE_API Verdict can_run(const DequantizeProblem& problem, std::string_view name);

/// The backend for the problem. Throws `Error` with can_run's reason when there is none.
UMFA_CORE_API const Backend& route(const Problem& problem, std::string_view name);
UMFA_CORE_API const Backend& route(const CombineProblem& problem, std::string_view name);
UMFA_CORE_API const Backend& route(const Steps& steps, std::string_view name);
UMFA_CORE_API const Backend& route(const BackwardProblem& problem, std::string_view name);
UMFA_CORE_API const Backend& route(const QuantizeProblem& problem, std::string_view name);
UMFA_CORE_API const Backend& route(const DequantizeProblem& problem, std::string_view name);

/// Whether can_run or route may test a device, or wait for a test in another thread. The caller
/// must then release locks that the device needs, such as the GIL.
UMFA_CORE_API bool routing_may_wait(const Problem& problem);
UMFA_CORE_API bool routing_may_wait(const CombineProblem& problem);
UMFA_CORE_API bool routing_may_wait(const Steps& steps);
UMFA_CORE_API bool routing_may_wait(const BackwardProblem& problem);
UMFA_CORE_API bool routing_may_wait(const QuantizeProblem& problem);
UMFA_CORE_API bool routing_may_wait(const DequantizeProblem& problem);

/// route() for a call that runs now. While a backend compiles the kernels of a first call, another
/// one may run it (Operation::postpone).
UMFA_CORE_API const Backend& route_call(const Problem& problem, std::string_view name);

/// What warm_up() did.
struct Warmup {
    const char* backend;
    Kernels kernels;
};
/// Compiles the kernels that the call would use, on the backend that would run it. `results`: the
/// call's, or results_without_memory(). Throws `Error` as route() does, or if a kernel does not
/// compile.
UMFA_CORE_API Warmup warm_up(const Problem& problem, std::string_view name,
                             const ForwardResults& results);
UMFA_CORE_API Warmup warm_up(const CombineProblem& problem, std::string_view name);
/// Hands the call's launches to a player that compiles them. Returns the backend's name; throws
/// `Error` as route() does.
UMFA_CORE_API const char* warm_up(const Problem& problem, std::string_view name,
                                  const ForwardResults& results, Player& player);
UMFA_CORE_API const char* warm_up(const CombineProblem& problem, std::string_view name,
                                  Player& player);

/// Runs the problem on `backend`, and counts the call.
UMFA_CORE_API void forward(const Backend& backend, const Problem& problem,
                           const ForwardResults& results);
UMFA_CORE_API void combine(const Backend& backend, const CombineProblem& problem,
                           const CombineResults& results);
UMFA_CORE_API void backward(const Backend& backend, const BackwardProblem& problem,
                            const BackwardResults& results);
UMFA_CORE_API void quantize(const Backend& backend, const QuantizeProblem& problem,
                            const QuantizeResults& results);
UMFA_CORE_API void dequantize(const Backend& backend, const DequantizeProblem& problem,
                              const DequantizeResults& results);

/// The same on the player's stream. Where its launches cannot go there, `backend` runs the call.
UMFA_CORE_API void forward(const Backend& backend, const Problem& problem,
                           const ForwardResults& results, Player& player);
UMFA_CORE_API void backward(const Backend& backend, const BackwardProblem& problem,
                            const BackwardResults& results, Player& player);
UMFA_CORE_API void combine(const Backend& backend, const CombineProblem& problem,
                           const CombineResults& results, Player& player);
/// Requires problem.allow_nonfinite.
UMFA_CORE_API void quantize(const Backend& backend, const QuantizeProblem& problem,
                            const QuantizeResults& results, Player& player);
UMFA_CORE_API void dequantize(const Backend& backend, const DequantizeProblem& problem,
                              const DequantizeResults& results, Player& player);

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

/// The GPU's choices in use; nullopt without a GPU.
UMFA_CORE_API std::optional<Tuned> tuning();
/// Uses other values in this process, and if `keep` says so in later ones. Throws `Error` without a
/// GPU, or if a value is out of range.
UMFA_CORE_API Tuned tune(const Tuned& tuned, bool keep);

/// Puts a Metal backend that another library brings into the routing; null takes it out again. For
/// the tests, whose Metal is a double, in a library of its own.
UMFA_CORE_API void set_metal_backend(const Backend* backend);

}  // namespace umfa
