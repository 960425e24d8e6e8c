// The self-test: before the kernels of a dtype are trusted on a GPU, a small case of each family has
// run there, and the CPU backend agrees. docs/backends.md describes it.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "core/backend.h"
#include "core/dtype.h"
#include "core/export.h"
#include "core/self_test.h"
#include "metal/self_test_cases.h"

namespace umfa::metal {

/// The GPU under test.
struct Machine {
    std::string device;  // "Apple M3 Max, applegpu_g15s"
    Capabilities capabilities;
    Runner run;
    std::function<void()> after_hang;  // makes it possible to run more; what hangs goes on
};

/// UMFA_SELF_TEST: 0, 1 (or nothing) or force.
enum class SelfTestMode { never, once, force };
/// Throws `Error` if the variable has another value.
UMFA_CORE_API SelfTestMode self_test_mode();

/// The report of an earlier process, or else (with `force` always) that of a test now, which is kept
/// for others.
UMFA_CORE_API SelfTestReport self_test(const std::shared_ptr<const Machine>& machine, DType dtype,
                                       bool force);

/// The reports that a process has of one GPU.
class UMFA_CORE_API SelfTests {
public:
    using MakeMachine = std::function<std::shared_ptr<const Machine>()>;

    /// The first caller tests, as UMFA_SELF_TEST says; others wait. A report without results means
    /// that there is to be no test. Throws `Error` as self_test_mode().
    std::shared_ptr<const SelfTestReport> of(DType dtype, const MakeMachine& machine);
    /// The report if there is one, of this process or an earlier one; else null. Neither tests nor
    /// waits.
    std::shared_ptr<const SelfTestReport> known(DType dtype, const MakeMachine& machine);
    /// Whether of() might test.
    bool may_wait(DType dtype);

private:
    struct Slot {
        std::mutex lock;
        std::atomic<bool> done{false};
        bool looked = false;  // for what an earlier process has kept
        std::shared_ptr<const SelfTestReport> report;
    };
    Slot& slot_of(DType dtype);
    Slot slots_[3];
};

/// Whether the report trusts what a plan launches, and if not, why.
UMFA_CORE_API Verdict trusts(const SelfTestReport& report, const LaunchPlan& plan);

/// A plan that launches what the problem needs, but has no results to write.
UMFA_CORE_API LaunchPlan plan_without_results(const Problem& problem, const Capabilities& gpu);
UMFA_CORE_API LaunchPlan plan_without_results(const CombineProblem& problem,
                                              const Capabilities& gpu);

/// How long a case may take until it counts as hanging. For the tests.
UMFA_CORE_API void set_self_test_patience(std::chrono::milliseconds patience);

}  // namespace umfa::metal
