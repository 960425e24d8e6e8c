// Runs one dispatch: threadgroups one after another, errors, and what the host gets back.

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

extern "C" {
umfa_thread* umfa_self;
uint32_t umfa_site;
umfa_static_counters umfa_counts;
}

namespace umfa_runtime {

Runtime R;

std::string text(const char* format, ...) {
    char s[512];
    va_list list;
    va_start(list, format);
    vsnprintf(s, sizeof s, format, list);
    va_end(list);
    return s;
}

std::string site_text(uint32_t site) {
    if (site == 0 || site >= R.d->site_count) return "an unknown place";
    return text("%s:%u", R.d->sites[site].file, R.d->sites[site].line);
}

std::string thread_text(const Fiber& f) {
    const unsigned* g = R.launch.threadgroup;
    return text("thread (%u,%u,%u) of threadgroup (%u,%u,%u)", f.position[0], f.position[1],
                f.position[2], g[0], g[1], g[2]);
}

// Leaves the dispatch: the fibers are simply not resumed.
[[noreturn]] void fail(const char* check, uint32_t site, const std::string& what) {
    if (!R.running) abort();
    R.failed = true;
    // What goes wrong after a read of unwritten memory mostly does so for that reason.
    const bool follows = R.unwritten_read && strcmp(check, "data race") != 0;
    R.check = follows ? "uninitialised threadgroup memory" : check;
    R.error = follows ? R.unwritten_text : what;
    R.error_site = follows ? R.unwritten_site : site;
    void* dropped;
    umfa_switch(&dropped, R.main_stack);
    abort();
}

void report_unwritten_read() {
    if (R.unwritten_read) fail("uninitialised threadgroup memory", 0, "");
}
}  // namespace umfa_runtime

using namespace umfa_runtime;

extern "C" {

unsigned umfa_launch_value(unsigned what, unsigned axis) {
    const Fiber* f = current();
    const umfa_launch_position& l = R.launch;
    switch (what) {
        case 0: return l.threadgroup[axis] * R.d->threads[axis] + f->position[axis];
        case 1: return l.threadgroup[axis];
        case 2: return R.d->threadgroups[axis];
        case 3: return f->position[axis];
        case 4: return R.d->threads[axis];
        case 5: return R.d->threadgroups[axis] * R.d->threads[axis];
        case 6: return f->index;
        case 7: return f->self.lane;
        case 8: return f->self.simdgroup;
        case 9: return kLanes;
        case 10: return static_cast<unsigned>(R.simdgroups.size());
        case 11: return f->index % 4;
        case 12: return f->index / 4;
        case 13: return (R.threads + 3) / 4;
        default: return 0;
    }
}

static void fill_lane_map() {
    for (unsigned lane = 0; lane < kLanes; lane++) {
        unsigned b[5];
        for (unsigned i = 0; i < 5; i++) b[i] = lane >> i & 1;
        // The map of Apple's GPUs: lane bits 0 and 3 choose the column pair, 1, 2 and 4 the row.
        unsigned row = b[1] | b[2] << 1 | b[4] << 2, pair = b[0] | b[3] << 1;
        // The permuted one keeps which bits choose what, so that reductions along rows (xor 1, 8)
        // and columns (xor 2, 4, 16) still work, and changes everything else.
        if (R.d->permute_lanes) {
            row = (b[2] | b[4] << 1 | b[1] << 2) ^ 5;
            pair = (b[3] | b[0] << 1) ^ 2;
        }
        R.map_row[lane] = row;
        R.map_column[lane] = 2 * pair;
    }
}

static void run_threadgroup(uint32_t number) {
    const umfa_dispatch& d = *R.d;
    R.launch.threadgroup[0] = number % d.threadgroups[0];
    R.launch.threadgroup[1] = number / d.threadgroups[0] % d.threadgroups[1];
    R.launch.threadgroup[2] = number / d.threadgroups[0] / d.threadgroups[1];
    R.live = R.threads;
    R.waiting = 0;
    R.unwritten_read = false;
    if (R.epoch > kMaxEpoch / 2) {
        R.threadgroup_stamps.resize(R.threadgroup_stamps.write.size());
        R.epoch = 0;
    }
    R.group_epoch = R.barrier_epoch = ++R.epoch;
    R.device_group_epoch = R.device_barrier_epoch = ++R.device_epoch;
    R.group_epochs.push_back(R.device_epoch);
    R.group_numbers.push_back(number);
    poison_threadgroup_memory();
    const unsigned groups = (R.threads + kLanes - 1) / kLanes;
    R.simdgroups.resize(groups);
    for (unsigned t = 0; t < R.threads; t++) {
        Fiber& f = R.fibers[t];
        if (f.memory == nullptr) {
            f.memory = R.stacks + t * kStackBytes;
            mprotect(f.memory + kGuardBytes, kStackBytes - kGuardBytes, PROT_READ | PROT_WRITE);
        }
        f.index = t;
        f.self = {t % kLanes, t / kLanes, R.map_row[t % kLanes], R.map_column[t % kLanes]};
        f.position[0] = t % d.threads[0];
        f.position[1] = t / d.threads[0] % d.threads[1];
        f.position[2] = t / d.threads[0] / d.threads[1];
        f.state = State::ready;
        f.simdgroup = &R.simdgroups[t / kLanes];
        f.site = f.trail_site = 0;
        f.trail = f.uniform = 0;
        f.steps_left = d.step_limit == 0 ? ~0ULL : d.step_limit + 1;
        start_fiber(f);
    }
    for (unsigned i = 0; i < groups; i++) {
        Simdgroup& s = R.simdgroups[i];
        s.first = i * kLanes;
        s.size = s.live = std::min(kLanes, R.threads - s.first);
        s.arrived = s.waiting = 0;
        s.first_done = nullptr;
        s.slots.active = 0;
        s.slots.reverse = d.reverse_reductions;
        s.threadgroup_epoch = R.epoch;
        s.device_epoch = R.device_epoch;
        build_ring(s);
    }
    Fiber* first = any_ready();
    umfa_self = &first->self;
    umfa_switch(&R.main_stack, first->stack);
    R.counters.threadgroups++;
}

static unsigned set_flush(bool on) {
#if defined(__x86_64__)
    const unsigned old = _mm_getcsr();
    _mm_setcsr(on ? old | 0x8040U : old & ~0x8040U);
    return old;
#else
    uint64_t old;
    asm volatile("mrs %0, fpcr" : "=r"(old));
    const uint64_t value = on ? old | 1ULL << 24 : old & ~(1ULL << 24);
    asm volatile("msr fpcr, %0" ::"r"(value));
    return static_cast<unsigned>(old);
#endif
}

static void restore_flush(unsigned old) {
#if defined(__x86_64__)
    _mm_setcsr(old);
#else
    const uint64_t value = old;
    asm volatile("msr fpcr, %0" ::"r"(value));
#endif
}

int umfa_run(const umfa_dispatch* dispatch, umfa_result* result) {
    R.d = dispatch;
    R.checks = dispatch->checks;
    umfa_site = 0;
    R.counters = umfa_counters{};
    umfa_counts = umfa_static_counters{};
    R.failed = false;
    R.error.clear();
    R.random = dispatch->schedule_seed * 0x9e3779b97f4a7c15ULL + 0x853c49e6748fea9bULL;
    R.threads = dispatch->threads[0] * dispatch->threads[1] * dispatch->threads[2];
    R.error_site = 0;
    fill_lane_map();
    if (!prepare_memory()) {
        R.check = "memory";
        R.error = "this process may not reserve the emulator's range of addresses (ulimit -v?)";
        *result = umfa_result{};
        result->check = R.check.c_str();
        result->error = R.error.c_str();
        return 1;
    }
    R.epoch = R.device_epoch = 0;
    R.group_epochs.clear();
    R.group_numbers.clear();
    const bool fits = prepare_threadgroup_memory();
    if (!fits && checks(umfa_checks_limits)) {
        R.failed = true;
        R.check = "threadgroup memory";
        R.error = text("%llu bytes of threadgroup memory; a threadgroup has %u",
                       static_cast<unsigned long long>(R.counters.threadgroup_memory),
                       kMaxThreadgroupBytes);
    } else if (R.threads == 0 || R.threads > kMaxThreads) {
        R.failed = true;
        R.check = "too many threads";
        R.error = text("%u threads per threadgroup; 1 to %u can run", R.threads, kMaxThreads);
    } else {
        const uint32_t total =
            dispatch->threadgroups[0] * dispatch->threadgroups[1] * dispatch->threadgroups[2];
        std::vector<uint32_t> order(total);
        for (uint32_t i = 0; i < total; i++) order[i] = i;
        if (dispatch->schedule_seed) {
            for (uint32_t i = total; i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
        }
        const unsigned old = set_flush(dispatch->flush_to_zero);
        {
            const FaultGuard guard;
            R.running = true;
            for (uint32_t i = 0; i < total && !R.failed; i++) run_threadgroup(order[i]);
            R.running = false;
        }
        restore_flush(old);
    }
    for (int i = 0; i < kBuffers; i++) {
        const Buffer& b = R.buffers[i];
        if (b.bound && dispatch->buffers[i].may_write)
            memcpy(const_cast<void*>(dispatch->buffers[i].data), b.data, b.size);
    }
    result->counters = R.counters;
    result->counts = umfa_counts;
    result->check = R.check.c_str();
    result->error = R.error.c_str();
    result->site = R.error_site;
    return R.failed;
}

}  // extern "C"
