#import "metal/background.h"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/error.h"
#import "metal/autorelease.h"
#import "metal/context.h"
#include "metal/plan_forward.h"
#include "metal/switches.h"
#include "metal/trust.h"

namespace umfa::metal {
namespace {

/// Above this many FLOP the GPU runs the first call too. Compiling takes tenths of a second to a few
/// seconds, in which the CPU kernels do about this much. An estimate: it has not been measured on
/// Apple hardware.
constexpr double most_postponed_flop = 1e11;

/// A process that ends waits so long for a compilation: Metal's own threads must not run on while
/// the libraries under them are unloaded.
constexpr std::chrono::seconds patience(10);

/// Never destroyed, since threads may outlive the end of main().
struct Jobs {
    std::mutex lock;
    std::condition_variable ended;
    int running = 0;
};
Jobs& jobs() {
    static auto* only = new Jobs;
    return *only;
}

/// Runs `work` in a thread; its errors are left to the call that needs the same next. False if no
/// thread could start.
bool start(std::function<void()> work) {
    static const int registered = std::atexit(wait_for_background);
    (void)registered;
    {
        const std::lock_guard guard(jobs().lock);
        ++jobs().running;
    }
    const auto end = [] {
        const std::lock_guard guard(jobs().lock);
        --jobs().running;
        jobs().ended.notify_all();
    };
    try {
        std::thread([work = std::move(work), end]() mutable {
            try {
                work();
            } catch (const std::exception&) {
            }
            work = nullptr;  // what it holds is let go before the end is seen
            end();
        }).detach();
        return true;
    } catch (const std::system_error&) {
        end();
        return false;
    }
}

/// The launches of all parts of a problem, in order.
std::vector<KernelLaunch> launches_of(const Problem& problem, const Capabilities& gpu) {
    std::vector<KernelLaunch> launches;
    for_each_part(problem, problem.results_without_memory(),
                  [&](const Problem& part, const ForwardResults& results) {
                      LaunchPlan plan = plan_forward(part, results, gpu);
                      for (KernelLaunch& launch : plan.launches)
                          launches.push_back(std::move(launch));
                  });
    return launches;
}

}  // namespace

bool postpone_forward(const Problem& problem) {
    if (!is_on(background_switch) || flop_of(problem) > most_postponed_flop) return false;
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current(problem.function);
    std::vector<KernelLaunch> missing;
    for (KernelLaunch& launch : launches_of(problem, context->capabilities()))
        if (!context->pipelines().claim(launch)) missing.push_back(std::move(launch));
    if (missing.empty()) return false;
    return start([context, missing = std::move(missing), test = self_tests_for(problem),
                  caller = std::string(problem.function)] {
        const AutoreleasePool own_pool;
        // The kernels first: the next call needs them whether or not its dtype is tested already.
        for (const KernelLaunch& launch : missing)
            context->pipelines().get(context->gpu(), launch, caller);
        test();
    });
}

double flop_of(const Problem& problem) {
    double pairs = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const SequenceRows rows = problem.sequence(b);
        pairs += static_cast<double>(rows.seqlen_q) * static_cast<double>(rows.seqlen_kv);
    }
    const double flop = 2.0 * pairs * static_cast<double>(problem.nheads_q) *
                        static_cast<double>(problem.head_dim + problem.head_dim_v);
    return problem.causal ? flop / 2 : flop;
}

bool compiles_in_background() {
    const std::lock_guard guard(jobs().lock);
    return jobs().running > 0;
}

void wait_for_background() {
    std::unique_lock guard(jobs().lock);
    jobs().ended.wait_for(guard, patience, [] { return jobs().running == 0; });
}

}  // namespace umfa::metal
