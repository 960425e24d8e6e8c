#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/error.h"
#include "cpu/features.h"
#include "cpu/float_environment.h"

namespace umfa::cpu {
namespace {

constexpr int64_t max_threads = 1024;

/// One parallel_for: threads draw indices from `next` until none are left.
struct Job {
    void (*task)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int64_t count = 0;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by the thread that set `failed`
    int helpers = 0;           // pool threads inside drain(); under the pool's mutex
    int max_helpers = 0;

    void drain() noexcept {
        const DefaultFloatEnvironment environment;
        for (;;) {
            const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
            if (index >= count) return;
            try {
                task(context, index);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
                next.store(count, std::memory_order_relaxed);
                return;
            }
        }
    }
};

class Pool {
public:
    void run(Job& job) {
        {
            std::lock_guard lock(mutex_);
            grow(job.max_helpers);
            jobs_.push_back(&job);
        }
        for (int i = job.max_helpers; i > 0; --i) wake_.notify_one();
        job.drain();
        std::unique_lock lock(mutex_);
        std::erase(jobs_, &job);  // no thread joins from here on
        done_.wait(lock, [&] { return job.helpers == 0; });
    }

private:
    void grow(int threads) {
        while (threads_ < threads) {
            try {
                std::thread([this] { work(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads: those that exist do the work, at least the caller
            }
            ++threads_;
        }
    }

    [[noreturn]] void work() {
        std::unique_lock lock(mutex_);
        for (;;) {
            Job* job = nullptr;
            wake_.wait(lock, [&] { return (job = open_job()) != nullptr; });
            ++job->helpers;
            lock.unlock();
            job->drain();
            lock.lock();
            if (--job->helpers == 0) done_.notify_all();
        }
    }

    /// The open job with the fewest helpers, so that concurrent callers share the pool.
    Job* open_job() const {
        Job* best = nullptr;
        for (Job* job : jobs_)
            if (job->helpers < job->max_helpers &&
                job->next.load(std::memory_order_relaxed) < job->count &&
                (!best || job->helpers < best->helpers))
                best = job;
        return best;
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Job*> jobs_;
    int threads_ = 0;
};

// A child of fork() has none of the pool's threads, and its mutex may have been held by one of
// them. So the child starts over with a new pool and leaves the old one where it is. The pool is
// never destroyed: detached threads may wait in it until the process ends. No mutex guards the
// pointer, since a child could inherit that one locked.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    static const int registered = pthread_atfork(
        nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_relaxed); });
    (void)registered;
    Pool* now = the_pool.load(std::memory_order_acquire);
    if (!now) {
        Pool* fresh = new Pool;
        if (the_pool.compare_exchange_strong(now, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;  // another thread was first
    }
    return *now;
}

/// The first number in `text`, 0 when there is none.
long leading_number(const char* text, const char** rest) {
    char* end = nullptr;
    errno = 0;
    const long number = std::strtol(text, &end, 10);
    while (*end == ' ') ++end;
    *rest = end;
    return errno != 0 ? 0 : number;
}

int threads_from_environment() {
    const char* rest = "";
    const char* own = std::getenv("UMFA_NUM_THREADS");
    if (own && *own) {
        const long count = leading_number(own, &rest);
        if (*rest != '\0' || count < 1 || count > max_threads)
            fail(ErrorKind::value, "umfa", "UMFA_NUM_THREADS is not a number of threads",
                 "'" + std::string(own) + "'", "1 to " + std::to_string(max_threads));
        return static_cast<int>(count);
    }
    // OMP_NUM_THREADS is OpenMP's, which takes lists (one number per nesting level) and ignores
    // what it cannot read. So does umfa.
    const char* omp = std::getenv("OMP_NUM_THREADS");
    if (omp && *omp) {
        const long count = leading_number(omp, &rest);
        if ((*rest == '\0' || *rest == ',') && count >= 1)
            return static_cast<int>(std::min<long>(count, max_threads));
    }
    return usable_cpus();
}

std::atomic<int> thread_count{0};  // 0: not read yet

}  // namespace

int num_threads() {
    int count = thread_count.load(std::memory_order_relaxed);
    if (count == 0) {
        count = threads_from_environment();
        thread_count.store(count, std::memory_order_relaxed);
    }
    return count;
}

void set_num_threads(int64_t count) {
    if (count < 1 || count > max_threads)
        fail(ErrorKind::value, "umfa.set_num_threads", "number of threads is out of range",
             std::to_string(count), "1 to " + std::to_string(max_threads));
    thread_count.store(static_cast<int>(count), std::memory_order_relaxed);
}

int threads_worth(double operations) {
    // Waking a thread and waiting for it took 5 to 15 us on the 2-core machine, where one core does
    // about 20000 multiplications in 1 us.
    constexpr double threshold = 4e5;
    return operations < threshold ? 1 : num_threads();
}

void parallel_for(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
    if (count <= 0) return;
    if (count == 1 || threads == 1) {
        const DefaultFloatEnvironment environment;
        for (int64_t i = 0; i < count; ++i) task(context, i);
        return;
    }
    Job job;
    job.task = task;
    job.context = context;
    job.count = count;
    job.max_helpers = static_cast<int>(std::min<int64_t>(threads, count) - 1);
    pool().run(job);
    if (job.failed) std::rethrow_exception(job.error);
}

namespace {

class Scratch {
public:
    float* at_least(int64_t floats) {
        if (floats > capacity_) {
            memory_.reset();
            capacity_ = 0;
            const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (!memory_) throw std::bad_alloc();
            capacity_ = floats;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t capacity_ = 0;
};

}  // namespace

float* thread_scratch(int64_t floats) {
    thread_local Scratch scratch;
    return scratch.at_least(floats);
}

float* call_scratch(int64_t floats) {
    thread_local Scratch scratch;
    return scratch.at_least(floats);
}

}  // namespace umfa::cpu
