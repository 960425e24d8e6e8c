#import "metal/context.h"

#include <unistd.h>

#include "core/error.h"
#include "core/stats.h"
#import "metal/autorelease.h"
#include "metal/tuning.h"

namespace umfa::metal {
namespace {

/// Never destroyed: the system takes the GPU's objects when the process ends, and other threads may
/// still be in a call then.
struct Slot {
    std::mutex lock;
    std::shared_ptr<Context> context;
    pid_t process = 0;  // that first used the GPU
};
Slot& slot() {
    static auto* only = new Slot;
    return *only;
}

std::shared_ptr<Context> open(std::string& reason) {
    const AutoreleasePool pool;
    const std::lock_guard guard(slot().lock);
    if (slot().process != 0 && slot().process != getpid()) {
        reason = "this process was forked from one that had used the GPU; start it afresh "
                 "(multiprocessing's method 'spawn')";
        return nullptr;
    }
    if (!slot().context) {
        std::optional<Gpu> gpu = open_gpu(reason);
        if (!gpu) return nullptr;
        slot().context = std::make_shared<Context>(std::move(*gpu));
        slot().process = getpid();
    }
    return slot().context;
}

}  // namespace

std::shared_ptr<Context> Context::current(std::string_view caller) {
    std::string reason;
    std::shared_ptr<Context> context = open(reason);
    if (!context)
        fail(ErrorKind::unsupported, caller, "the GPU is not available", reason,
             "a Mac with Apple silicon");
    return context;
}

Verdict Context::available() {
    std::string reason;
    return {open(reason) != nullptr, reason};
}

void Context::release() {
    const AutoreleasePool pool;
    std::shared_ptr<Context> last;
    const std::lock_guard guard(slot().lock);
    last.swap(slot().context);
}

Context::Context(Gpu gpu) : gpu_(std::move(gpu)), tuned_(read_tuning(describe(gpu_))) {}

Capabilities Context::capabilities() {
    const std::lock_guard guard(lock_);
    Capabilities all = gpu_.capabilities;
    all.decode_threadgroups_per_core = tuned_.values.decode_threadgroups_per_core;
    all.tiles = tuned_.values.tiles;
    return all;
}

Tuned Context::tuned() {
    const std::lock_guard guard(lock_);
    return tuned_;
}

void Context::tune(const Tuned& tuned) {
    check_tuning(tuned.values);
    const std::lock_guard guard(lock_);
    tuned_ = tuned;
}

id<MTLCommandQueue> Context::queue(std::string_view caller) {
    const std::lock_guard guard(lock_);
    if (!queue_) queue_ = [gpu_.device newCommandQueue];
    if (!queue_)
        fail(ErrorKind::device, caller, "Metal made no command queue", "nil",
             "fewer queues in this process");
    return queue_;
}

void Context::replace_queue(id<MTLCommandQueue> failed) {
    const std::lock_guard guard(lock_);
    if (queue_ != failed) return;  // another call that failed on it has done so
    queue_ = nil;
    ++stats().queues_replaced;
}

}  // namespace umfa::metal
