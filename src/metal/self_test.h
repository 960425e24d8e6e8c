// The self-test: before umfa uses a GPU with a dtype, it runs a small case of each kernel family on
// it and compares the results with the CPU backend. docs/backends.md describes it.
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
    std::function<void()> after_hang;  // prepares for more cases; the hung one still runs
};

/// UMFA_SELF_TEST: 0, 1 (or unset) or force.
enum class SelfTestMode { never, once, force };
/// Throws `Error` if the variable has another value.
UMFA_CORE_API SelfTestMode self_test_mode();

/// Returns the stored report of an earlier process. Without one, or with `force`, tests now and
/// stores the report.
UMFA_CORE_API SelfTestReport self_test(const std::shared_ptr<const Machine>& machine, DType dtype,
                                       bool force);

/// The reports of this process on one GPU.
class UMFA_CORE_API SelfTests {
public:
    using MakeMachine = std::function<std::shared_ptr<const Machine>()>;

    /// The first caller tests, as UMFA_SELF_TEST says; others wait. With UMFA_SELF_TEST=0 the
    /// report has no results. Throws `Error` as self_test_mode() does.
    std::shared_ptr<const SelfTestReport> of(DType dtype, const MakeMachine& machine);
    /// The report of this process or a stored one; null if there is none. Neither tests nor waits.
    std::shared_ptr<const SelfTestReport> known(DType dtype, const MakeMachine& machine);
    /// Whether of() may test, or wait for a test.
    bool may_wait(DType dtype);

private:
    struct Slot {
        std::mutex lock;
        std::atomic<bool> done{false};
        bool looked = false;  // for a stored report
        std::shared_ptr<const SelfTestReport> report;
    };
    Slot& slot_of(DType dtype);
    Slot slots_[3];
};

/// Whether the report excludes no kernel that the plan launches; if it does, why.
UMFA_CORE_API Verdict trusts(const SelfTestReport& report, const LaunchPlan& plan);

/// A plan with the problem's launches, to look up their families; it has no results and cannot run.
UMFA_CORE_API LaunchPlan plan_without_results(const Problem& problem, const Capabilities& gpu);
UMFA_CORE_API LaunchPlan plan_without_results(const CombineProblem& problem,
                                              const Capabilities& gpu);
UMFA_CORE_API LaunchPlan plan_without_results(const BackwardProblem& problem,
                                              const Capabilities& gpu);
UMFA_CORE_API LaunchPlan plan_without_results(const QuantizeProblem& problem,
                                              const Capabilities& gpu);
UMFA_CORE_API LaunchPlan plan_without_results(const DequantizeProblem& problem,
                                              const Capabilities& gpu);

/// Time after which a case counts as hung. For the tests.
UMFA_CORE_API void set_self_test_patience(std::chrono::milliseconds patience);

}  // namespace umfa::metal
