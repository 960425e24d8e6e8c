#include "metal/self_test.h"

#include <atomic>
#include <cmath>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "core/error.h"
#include "core/stats.h"
#include "metal/build_facts.h"
#include "metal/kernel_families.h"
#include "metal/plan_backward.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/plan_quantize.h"
#include "metal/self_test_record.h"

namespace umfa::metal {
namespace {

/// A family is excluded after more deaths in a row. One says little of the kernels: the process may
/// have been killed for another reason.
constexpr int most_deaths = 1;

/// After this many hangs the remaining cases are not tested, since each hang makes the caller wait
/// for the whole patience. macOS ends GPU work that hangs within seconds, and compiling takes less.
constexpr int most_hangs = 2;

std::atomic<int64_t> patience_ms{20000};

/// Everything that the outcome depends on.
std::string key_of(const Machine& machine, DType dtype) {
    return "umfa " + kernels_text() + "; " + machine.device + "; " + system_text() + "; " +
           name_of(dtype);
}

/// Runs `body` in a thread and returns its result; nullopt if it takes too long. The thread is then
/// detached and goes on, so `body` must own everything that it uses.
std::optional<std::string> within_patience(std::function<std::string()> body) {
    std::packaged_task<std::string()> task(std::move(body));
    std::future<std::string> result = task.get_future();
    std::thread worker(std::move(task));
    const std::chrono::milliseconds patience(patience_ms.load());
    if (result.wait_for(patience) != std::future_status::ready) {
        worker.detach();
        return {};
    }
    worker.join();
    return result.get();
}

/// The message without its "[umfa.self_test] " prefix.
std::string without_function(const std::string& message) {
    const size_t end = message.find("] ");
    return end == message.npos ? message : message.substr(end + 2);
}

class Tester {
public:
    /// `deaths`: for each family, how many processes in a row ended during its case.
    Tester(std::shared_ptr<const Machine> machine, DType dtype, SelfTestRecord& record,
           std::map<std::string, int> deaths)
        : machine_(std::move(machine)), record_(record), deaths_(std::move(deaths)) {
        report_.dtype = name_of(dtype);
        report_.device = machine_->device;
        report_.system = system_text();
        report_.when = time_text();
    }

    SelfTestReport run(const std::vector<SelfTestCase>& cases) {
        const uint64_t pipelines = stats().pipelines;
        const auto start = std::chrono::steady_clock::now();
        for (const SelfTestCase& one : cases) report_.results.push_back({one.family, judge(one)});
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        report_.seconds = std::round(taken.count() * 1000) / 1000;  // the precision of the file
        report_.pipelines = static_cast<int64_t>(stats().pipelines - pipelines);
        if (out_of_memory_)
            report_.not_kept = "there was not enough memory for the test";
        else
            record_.write(report_);
        return report_;
    }

private:
    std::string judge(const SelfTestCase& one) {
        if (const std::string fault = fault_of(one.needs); !fault.empty())
            return one.needs + ": " + fault;
        const auto died = deaths_.find(one.family);
        if (died != deaths_.end() && died->second > most_deaths)
            return std::to_string(died->second) + " processes in a row did not survive the test";
        if (hangs_ >= most_hangs) return "not tested, since other kernels hang";
        if (died != deaths_.end()) report_.tried_again.push_back(one.family);
        record_.begin(one.family);
        std::string fault = attempt(one);
        record_.end(one.family);
        return fault;
    }

    std::string attempt(const SelfTestCase& one) {
        try {
            // The thread may outlive this call, so it gets copies.
            std::optional<std::string> fault =
                within_patience([machine = machine_, run = one.run] { return run(machine->run); });
            if (fault) return *fault;
        } catch (const Error& error) {
            out_of_memory_ = out_of_memory_ || error.kind() == ErrorKind::memory;
            return without_function(error.what());
        } catch (const std::exception& error) {  // out of memory, or no thread could start
            out_of_memory_ = true;
            return error.what();
        }
        ++hangs_;
        machine_->after_hang();
        return "the GPU did not finish the test within " +
               umfa::text_of(static_cast<double>(patience_ms.load()) / 1000) + " s";
    }

    std::string fault_of(const std::string& family) const {
        for (const SelfTestResult& result : report_.results)
            if (result.family == family) return result.fault;
        return {};
    }

    const std::shared_ptr<const Machine> machine_;
    SelfTestRecord& record_;
    const std::map<std::string, int> deaths_;
    SelfTestReport report_;
    int hangs_ = 0;
    bool out_of_memory_ = false;
};

/// A result without memory, for a plan that is not run: the planner reads only its strides.
Operand without_memory(const TensorView& view) {
    Operand operand{view};
    operand.stride_channel = 1;
    return operand;
}

}  // namespace

SelfTestReport self_test(const std::shared_ptr<const Machine>& machine, DType dtype, bool force) {
    SelfTestRecord record(key_of(*machine, dtype));
    if (!force)
        if (std::optional<SelfTestReport> known = record.read()) return *known;
    record.lock(std::chrono::seconds(120));
    // Another process may have tested while this one waited for the lock.
    if (!force)
        if (std::optional<SelfTestReport> known = record.read()) return *known;
    return Tester(machine, dtype, record, force ? std::map<std::string, int>{} : record.deaths())
        .run(self_test_cases(dtype, machine->capabilities));
}

std::shared_ptr<const SelfTestReport> SelfTests::of(DType dtype, const MakeMachine& machine) {
    Slot& slot = slot_of(dtype);
    if (slot.done.load(std::memory_order_acquire)) return slot.report;
    const std::lock_guard guard(slot.lock);
    if (!slot.done.load(std::memory_order_relaxed)) {
        const SelfTestMode mode = self_test_mode();
        slot.report = std::make_shared<SelfTestReport>(
            mode == SelfTestMode::never ? SelfTestReport{}
                                        : self_test(machine(), dtype, mode == SelfTestMode::force));
        slot.done.store(true, std::memory_order_release);
    }
    return slot.report;
}

std::shared_ptr<const SelfTestReport> SelfTests::known(DType dtype, const MakeMachine& machine) {
    Slot& slot = slot_of(dtype);
    // Without the lock, which another reader may hold for a moment.
    if (slot.done.load(std::memory_order_acquire)) return slot.report;
    const std::unique_lock guard(slot.lock, std::try_to_lock);
    if (!guard.owns_lock()) return nullptr;
    if (!slot.done && !slot.looked && self_test_mode() == SelfTestMode::once) {
        slot.looked = true;
        std::optional<SelfTestReport> report = SelfTestRecord(key_of(*machine(), dtype)).read();
        if (report) {
            slot.report = std::make_shared<SelfTestReport>(std::move(*report));
            slot.done.store(true, std::memory_order_release);
        }
    }
    return slot.report;
}

bool SelfTests::may_wait(DType dtype) {
    return !slot_of(dtype).done.load(std::memory_order_acquire);
}

SelfTests::Slot& SelfTests::slot_of(DType dtype) {
    return slots_[dtype == DType::f16 ? 0 : dtype == DType::bf16 ? 1 : 2];
}

Verdict trusts(const SelfTestReport& report, const LaunchPlan& plan) {
    for (const KernelLaunch& launch : plan.launches)
        for (const std::string& family : families_of(launch))
            for (const SelfTestResult& result : report.results)
                if (result.family == family && !result.fault.empty())
                    return {false,
                            "the self-test of this GPU excludes " + family + ": " + result.fault};
    return {};
}

LaunchPlan plan_without_results(const Problem& problem, const Capabilities& gpu) {
    return plan_forward(problem, {without_memory(problem.out_shape()), {}}, gpu);
}

LaunchPlan plan_without_results(const CombineProblem& problem, const Capabilities& gpu) {
    return plan_combine(problem, {{problem.out_shape()}, {problem.lse_shape()}}, gpu);
}

LaunchPlan plan_without_results(const BackwardProblem& problem, const Capabilities& gpu) {
    BackwardResults results;
    const auto add = [&](Gradient gradient, std::optional<Operand>& result) {
        if (problem.wants(gradient)) result = without_memory(problem.shape_of(gradient));
    };
    add(Gradient::query, results.query);
    add(Gradient::key, results.key);
    add(Gradient::value, results.value);
    add(Gradient::qv, results.qv);
    if (problem.wants(Gradient::sinks)) results.sinks = Sinks{problem.shape_of(Gradient::sinks)};
    if (problem.wants(Gradient::mask))
        results.mask = problem.mask_gradient(problem.shape_of(Gradient::mask));
    if (problem.wants(Gradient::alibi_slopes))
        results.alibi_slopes = Alibi{problem.shape_of(Gradient::alibi_slopes), 0, 1};
    return plan_backward(problem, results, gpu);
}

LaunchPlan plan_without_results(const QuantizeProblem& problem, const Capabilities& gpu) {
    QuantizeResults results{{problem.data_shape()}, {problem.scales_shape()}, {}};
    if (const auto shape = problem.zero_points_shape()) results.zero_points = Operand{*shape};
    return plan_quantize(problem, results, nullptr, gpu);
}

LaunchPlan plan_without_results(const DequantizeProblem& problem, const Capabilities& gpu) {
    return plan_dequantize(problem, {{problem.out_shape()}}, gpu);
}

void set_self_test_patience(std::chrono::milliseconds patience) { patience_ms = patience.count(); }

}  // namespace umfa::metal
