// Runs one dispatch of a kernel on the CPU: threads of the GPU are fibers, threadgroups run one
// after another, and every access that the instrumented kernel reports is checked.
//
// The lanes of a simdgroup form a ring. A lane that arrives at a rendezvous hands over to the next
// in the ring; the last to arrive does the work of all and goes on. So a simdgroup operation costs
// one switch per lane. All state is global: one dispatch at a time per loaded library.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "interface.h"

// ---------------------------------------------------------------------------------------------
// Stack switch

extern "C" void umfa_switch(void** from, void* to);

#if defined(__APPLE__)
#define UMFA_SYMBOL(name) "_" name
#else
#define UMFA_SYMBOL(name) name
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl )" UMFA_SYMBOL("umfa_switch") R"(
)" UMFA_SYMBOL("umfa_switch") R"(:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr int kSavedRegisters = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl )" UMFA_SYMBOL("umfa_switch") R"(
.p2align 2
)" UMFA_SYMBOL("umfa_switch") R"(:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "no stack switch for this processor"
#endif

namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxThreadgroupBytes = 32768;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 16 * 1024;

// Every buffer index owns a stretch of addresses far larger than any buffer, with the buffer in its
// middle: an address tells its index, and no wrong index lands in another buffer.
constexpr int kBuffers = 31;
constexpr int kSlots = 32;  // the last stands for arguments whose function constant is false
constexpr int kSlotBits = 34;
constexpr uint64_t kSlotBytes = 1ULL << kSlotBits;

// A stamp is an epoch and a thread: who touched a byte last, and since which barrier.
constexpr uint32_t kThreadBits = 10;
constexpr uint32_t kMaxEpoch = (1U << (32 - kThreadBits)) - 1;

enum class State : uint8_t { ready, at_simd, at_barrier, done };

struct Fiber {
    umfa_thread self;  // first: umfa_self points here
    unsigned index;    // in the threadgroup, x first
    unsigned position[3];
    State state;
    uint8_t ring;  // place in its simdgroup's ring
    void* stack;
    uint32_t site;
    uint64_t trail;       // hash of the operations that need convergence but do not meet
    uint32_t trail_site;  // the last of them
    uint64_t uniform;     // must be the same in all lanes of the coming operation
    char* memory;
};

struct Stamps {
    std::vector<uint32_t> write, read, other_read;
    void resize(size_t n) {
        write.assign(n, 0);
        read.assign(n, 0);
        other_read.assign(n, 0);
    }
};

struct Simdgroup {
    unsigned first;  // its first thread
    const Fiber* first_done;  // the lane that returned first
    unsigned size;
    unsigned live;
    unsigned arrived;
    unsigned waiting;  // at a threadgroup barrier
    Fiber* ring[kLanes];
    unsigned ring_size;
    umfa_lane_slots slots;
    uint32_t site;
    unsigned kind;
    umfa_combine combine;
    uint32_t threadgroup_epoch;  // accesses of this simdgroup before this one are ordered
    uint32_t device_epoch;
};

struct Buffer {
    bool bound, written;
    char* data;
    uint64_t size;
    uint64_t mapped;
    char* mapping;
    Stamps stamps;
    bool tracked;
};

struct Region {  // of threadgroup memory
    uint64_t begin, size;
    const char* name;  // null: [[threadgroup(index)]]
    int index;
    uint32_t shadow;  // place of its first byte in the stamps
};

struct Runtime {
    const umfa_dispatch* d;
    umfa_counters counters;
    Fiber* fibers = nullptr;
    char* stacks = nullptr;
    std::vector<Simdgroup> simdgroups;
    void* main_stack;
    unsigned threads, live;
    unsigned waiting;  // threads at the threadgroup barrier
    uint32_t barrier_site;
    unsigned barrier_flags;
    umfa_launch_position launch;
    uint64_t random;
    char* slots = nullptr;
    Buffer buffers[kBuffers];
    std::vector<Region> regions;
    std::vector<char> arena;
    uint64_t arena_begin, arena_end;
    Stamps threadgroup_stamps;
    Region* last_region;
    uint32_t epoch, group_epoch, barrier_epoch;                       // threadgroup memory
    uint32_t device_epoch, device_group_epoch, device_barrier_epoch;  // device memory
    std::vector<uint32_t> group_epochs;  // device epoch at which each threadgroup began
    std::vector<uint32_t> group_numbers;
    std::string error, check;
    uint32_t error_site;
    bool failed, running = false;
    unsigned map_row[kLanes], map_column[kLanes];
    unsigned current_combine_site;
    Fiber* combining;
};

Runtime R;
inline Fiber* current() { return reinterpret_cast<Fiber*>(umfa_self); }

}  // namespace

extern "C" {
umfa_thread* umfa_self;
uint32_t umfa_site;
umfa_static_counters umfa_counts;
}

namespace {

// ---------------------------------------------------------------------------------------------
// Errors

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
    R.check = check;
    R.error = what;
    R.error_site = site;
    void* dropped;
    umfa_switch(&dropped, R.main_stack);
    abort();
}

// ---------------------------------------------------------------------------------------------
// Scheduling

uint64_t next_random() {
    R.random ^= R.random << 13;
    R.random ^= R.random >> 7;
    R.random ^= R.random << 17;
    return R.random;
}

void switch_to(Fiber* to) {
    Fiber* from = current();
    if (from == to) return;
    umfa_self = &to->self;
    umfa_switch(&from->stack, to->stack);
}

void build_ring(Simdgroup& s) {
    s.ring_size = 0;
    for (unsigned i = 0; i < s.size; i++) {
        Fiber* f = &R.fibers[s.first + i];
        if (f->state != State::done) s.ring[s.ring_size++] = f;
    }
    if (R.d->schedule_seed != 0) {
        for (unsigned i = s.ring_size; i > 1; i--)
            std::swap(s.ring[i - 1], s.ring[next_random() % i]);
    }
    for (unsigned i = 0; i < s.ring_size; i++) s.ring[i]->ring = static_cast<uint8_t>(i);
}

Fiber* next_in_ring(const Simdgroup& s, const Fiber* f) {
    const unsigned next = f->ring + 1U;
    return s.ring[next == s.ring_size ? 0 : next];
}

// A ready lane of any simdgroup, from a random place on, or none.
Fiber* any_ready() {
    const unsigned n = static_cast<unsigned>(R.simdgroups.size());
    const unsigned start = R.d->schedule_seed ? static_cast<unsigned>(next_random() % n) : 0;
    for (unsigned i = 0; i < n; i++) {
        Simdgroup& s = R.simdgroups[(start + i) % n];
        for (unsigned k = 0; k < s.ring_size; k++)
            if (s.ring[k]->state == State::ready) return s.ring[k];
    }
    return nullptr;
}

// The current lane cannot go on: hand over to a ready one, of its own simdgroup if there is one.
void hand_over(Simdgroup& s) {
    Fiber* f = current();
    for (Fiber* next = next_in_ring(s, f); next != f; next = next_in_ring(s, next)) {
        if (next->state == State::ready) return switch_to(next);
    }
    Fiber* other = any_ready();
    if (other == nullptr) fail("deadlock", f->site, "no thread can go on");
    switch_to(other);
}

Simdgroup& own_simdgroup() { return R.simdgroups[current()->self.simdgroup]; }

[[noreturn]] void fail_trails(const Fiber& a, const Fiber& b) {
    const Fiber& last = b.trail_site ? b : a;
    fail("divergent simdgroup operation", last.trail_site,
         "lanes of one simdgroup came through simdgroup_load or simdgroup_store operations that "
         "are not the same, or have other pointers or strides: " +
             thread_text(a) + " was last at " + site_text(a.trail_site) + ", " + thread_text(b) +
             " at " + site_text(b.trail_site));
}

void check_trails(Simdgroup& s) {
    const Fiber* first = s.first_done;
    for (unsigned i = 0; i < s.ring_size; i++) {
        const Fiber* f = s.ring[i];
        if (f->state == State::done) continue;
        if (first == nullptr) first = f;
        if (f->state == State::at_simd || f == current()) {
            if (s.kind == 3 && f->uniform != current()->uniform)
                fail("non-uniform shuffle", f->site,
                     text("%s passes %llu as the lane, mask or delta, %s passes %llu",
                          thread_text(*f).c_str(), static_cast<unsigned long long>(f->uniform),
                          thread_text(*current()).c_str(),
                          static_cast<unsigned long long>(current()->uniform)));
        }
        if (f->trail != first->trail) fail_trails(*first, *f);
    }
}

void complete(Simdgroup& s) {
    if (R.d->checks) check_trails(s);
    if (s.kind == 0) R.counters.simd_operations++;
    if (s.kind == 3) R.counters.shuffles++;
    if (s.combine != nullptr) {
        R.combining = current();
        s.combine(&s.slots);
    }
    if (s.kind == 3)
        for (unsigned i = 0; i < s.ring_size; i++) s.ring[i]->uniform = 0;
    s.arrived = 0;
    s.slots.active = 0;
    for (unsigned i = 0; i < s.ring_size; i++)
        if (s.ring[i]->state == State::at_simd) s.ring[i]->state = State::ready;
}

void rendezvous(void* slot, umfa_combine combine, unsigned kind) {
    Fiber* f = current();
    Simdgroup& s = own_simdgroup();
    f->site = umfa_site;
    if (s.arrived == 0) {
        s.site = umfa_site;
        s.kind = kind;
        s.combine = combine;
        if (s.waiting != 0) {
            for (unsigned i = 0; i < s.ring_size; i++) {
                if (s.ring[i]->state == State::at_barrier)
                    fail("divergent simdgroup operation", umfa_site,
                         thread_text(*f) + " is at a simdgroup operation while " +
                             thread_text(*s.ring[i]) + " waits at the threadgroup barrier of " +
                             site_text(s.ring[i]->site));
            }
        }
    } else if (umfa_site != s.site || combine != s.combine) {
        const Fiber* other = f;
        for (unsigned i = 0; i < s.ring_size; i++)
            if (s.ring[i]->state == State::at_simd) other = s.ring[i];
        fail("divergent simdgroup operation", umfa_site,
             thread_text(*f) + " is at " + site_text(umfa_site) + " while " +
                 thread_text(*other) + " of the same simdgroup is at " + site_text(other->site));
    }
    // A lane may have returned since the first of the others arrived.
    if (kind == 1 && s.live != kLanes)
        fail("inactive lanes", umfa_site,
             text("this operation needs all 32 lanes of the simdgroup; %u take part", s.live));
    if (kind == 2 && s.live != s.size)
        fail("divergent barrier", umfa_site,
             text("%u threads of the simdgroup returned before its simdgroup_barrier",
                  s.size - s.live));
    s.slots.slot[f->self.lane] = slot;
    s.slots.active |= 1U << f->self.lane;
    if (++s.arrived == s.live) {
        complete(s);
    } else {
        f->state = State::at_simd;
        hand_over(s);
    }
}

// The last live thread is at the barrier.
void release_barrier() {
    if (R.d->checks) {
        for (Simdgroup& s : R.simdgroups) check_trails(s);
    }
    if (R.barrier_flags & 2) R.barrier_epoch = ++R.epoch;
    if (R.barrier_flags & 1) R.device_barrier_epoch = ++R.device_epoch;
    R.waiting = 0;
    for (unsigned i = 0; i < R.threads; i++)
        if (R.fibers[i].state == State::at_barrier) R.fibers[i].state = State::ready;
    for (Simdgroup& s : R.simdgroups) {
        s.waiting = 0;
        if (R.d->schedule_seed) build_ring(s);
    }
}

void leave_ring(Simdgroup& s, Fiber* f) {
    for (unsigned i = f->ring; i + 1 < s.ring_size; i++) {
        s.ring[i] = s.ring[i + 1];
        s.ring[i]->ring = static_cast<uint8_t>(i);
    }
    s.ring_size--;
}

[[noreturn]] void fiber_main() {
    R.d->entry();
    Fiber* f = current();
    Simdgroup& s = own_simdgroup();
    f->state = State::done;
    if (s.first_done == nullptr) s.first_done = f;
    if (R.d->checks && f->trail != s.first_done->trail) fail_trails(*s.first_done, *f);
    if (R.waiting != 0) {
        const Fiber* other = f;
        for (unsigned i = 0; i < R.threads; i++)
            if (R.fibers[i].state == State::at_barrier) other = &R.fibers[i];
        fail("divergent barrier", other->site,
             thread_text(*f) + " returned while " + thread_text(*other) +
                 " waits at the threadgroup barrier of " + site_text(other->site));
    }
    leave_ring(s, f);
    s.live--;
    R.live--;
    void* dropped;
    if (R.live == 0) umfa_switch(&dropped, R.main_stack);
    if (s.arrived != 0 && s.arrived == s.live) {
        // The rest of the simdgroup waits for this lane alone.
        if (s.kind == 2)
            fail("divergent barrier", s.site,
                 thread_text(*f) + " returned while the others wait at a simdgroup_barrier");
        if (s.kind == 1)
            fail("inactive lanes", s.site,
                 thread_text(*f) + " returned before an operation that needs all 32 lanes");
        complete(s);
    }
    Fiber* next = nullptr;
    for (unsigned i = 0; i < s.ring_size && next == nullptr; i++) {
        Fiber* candidate = s.ring[(f->ring + i) % s.ring_size];
        if (candidate->state == State::ready) next = candidate;
    }
    if (next == nullptr) next = any_ready();
    if (next == nullptr) fail("deadlock", f->site, "no thread can go on");
    umfa_self = &next->self;
    umfa_switch(&dropped, next->stack);
    abort();
}

void start_fiber(Fiber& f) {
    // Stacks lie at multiples of a page: without the offset they would all use the same cache sets.
    const size_t color = f.index % 61 * 192;
    void** top = reinterpret_cast<void**>(f.memory + kStackBytes - 256 - color);
#if defined(__x86_64__)
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
#else
    top -= 20;
    memset(top, 0, 160);
    top[11] = reinterpret_cast<void*>(&fiber_main);
#endif
    f.stack = top;
}

// ---------------------------------------------------------------------------------------------
// Memory

bool conflicts(uint32_t stamp, uint32_t barrier, uint32_t simd_epoch, uint32_t group, uint32_t t,
               bool across_groups) {
    const uint32_t epoch = stamp >> kThreadBits, other = stamp & (kMaxThreads - 1);
    if (stamp == 0) return false;
    if (epoch < group) return across_groups;
    if (epoch < barrier || other == t) return false;
    return !(other / kLanes == t / kLanes && epoch < simd_epoch);
}

std::string other_text(uint32_t stamp, bool device_memory) {
    const uint32_t epoch = stamp >> kThreadBits, other = stamp & (kMaxThreads - 1);
    if (device_memory && epoch < R.device_group_epoch) {
        const size_t i = static_cast<size_t>(
            std::upper_bound(R.group_epochs.begin(), R.group_epochs.end(), epoch) -
            R.group_epochs.begin() - 1);
        const uint32_t n = R.group_numbers[i];
        const unsigned *g = R.d->threadgroups, *t = R.d->threads;
        return text("thread (%u,%u,%u) of threadgroup (%u,%u,%u)", other % t[0],
                    other / t[0] % t[1], other / t[0] / t[1], n % g[0], n / g[0] % g[1],
                    n / g[0] / g[1]);
    }
    return thread_text(R.fibers[other]);
}

struct Where {
    const char* kind;
    std::string name;
    uint64_t offset;
    bool device_memory;
};

[[noreturn]] void race(const Where& w, uint32_t stamp, bool write, const char* earlier,
                       uint32_t site) {
    fail("data race", site,
         thread_text(*current()) + (write ? " writes " : " reads ") + w.name +
             text(" at byte %llu, which ", static_cast<unsigned long long>(w.offset)) +
             other_text(stamp, w.device_memory) + " " + earlier +
             " with no barrier between them");
}

template <typename Describe>
inline void track(Stamps& stamps, uint64_t at, uint32_t size, uint32_t flags, uint32_t epoch,
                  uint32_t barrier, uint32_t simd_epoch, uint32_t group, bool device_memory,
                  const Describe& describe, uint32_t site) {
    const uint32_t t = current()->index;
    const uint32_t own = epoch << kThreadBits | t;
    const bool write = flags & umfa_access_write, atomic = flags & umfa_access_atomic;
    uint32_t* w = &stamps.write[at];
    uint32_t* r = &stamps.read[at];
    uint32_t* o = &stamps.other_read[at];
    if (atomic) {
        if (write)
            for (uint32_t i = 0; i < size; i++) w[i] = own;
        return;
    }
    uint32_t checked = own;  // bytes touched together mostly carry one stamp
    for (uint32_t i = 0; i < size; i++) {
        if (w[i] == checked) continue;
        checked = w[i];
        if (conflicts(checked, barrier, simd_epoch, group, t, device_memory))
            race(describe(at + i), checked, write, "wrote", site);
    }
    if (write) {
        uint32_t checked_read = own, checked_other = own;
        for (uint32_t i = 0; i < size; i++) {
            if (r[i] == checked_read && o[i] == checked_other) continue;
            checked_read = r[i];
            checked_other = o[i];
            for (uint32_t stamp : {checked_read, checked_other})
                if (conflicts(stamp, barrier, simd_epoch, group, t, device_memory))
                    race(describe(at + i), stamp, true, "read", site);
        }
        for (uint32_t i = 0; i < size; i++) w[i] = own;
    } else {
        for (uint32_t i = 0; i < size; i++) {
            if (r[i] == own) continue;
            if ((r[i] & (kMaxThreads - 1)) != t) o[i] = r[i];
            r[i] = own;
        }
    }
}

void check_alignment(uint64_t address, uint32_t flags, uint32_t site, const Where& w) {
    const uint32_t alignment = flags & umfa_access_alignment;
    if (address & (alignment - 1))
        fail("misaligned access", site,
             thread_text(*current()) + ((flags & umfa_access_write) ? " writes " : " reads ") +
                 w.name +
                 text(" at byte %lld, which is not a multiple of %u in memory",
                      static_cast<long long>(w.offset), alignment));
}

void device_access(uint64_t p, uint32_t size, uint32_t flags, uint32_t site, bool is_constant) {
    const uint64_t base = reinterpret_cast<uint64_t>(R.slots);
    const bool write = flags & umfa_access_write;
    const uint64_t index = (p - base) >> kSlotBits;
    if (p < base || index >= kSlots) {
        if (is_constant) {
            for (unsigned i = 0; i < R.d->unset_count; i++) {
                const umfa_unset& u = R.d->unset[i];
                if (p == reinterpret_cast<uint64_t>(u.address))
                    fail("function constant", site,
                         text("function constant '%s' (index %u) is used but has no value", u.name,
                              u.index));
            }
            return;  // a table of the program
        }
        fail("out of bounds", site,
             thread_text(*current()) + (write ? " writes" : " reads") +
                 " through a pointer that belongs to no buffer");
    }
    if (index == kBuffers)
        fail("unbound buffer", site,
             thread_text(*current()) + (write ? " writes" : " reads") +
                 " an argument whose function constant is false");
    Buffer& b = R.buffers[index];
    const int64_t offset = static_cast<int64_t>(p - reinterpret_cast<uint64_t>(b.data));
    if (!b.bound)
        fail("unbound buffer", site,
             thread_text(*current()) + (write ? " writes" : " reads") +
                 text(" buffer %d, which the dispatch does not bind", static_cast<int>(index)));
    if (offset < 0 || static_cast<uint64_t>(offset) + size > b.size)
        fail("out of bounds", site,
             thread_text(*current()) + (write ? " writes " : " reads ") +
                 text("%u bytes at byte %lld of buffer %d, which has %llu bytes", size,
                      static_cast<long long>(offset), static_cast<int>(index),
                      static_cast<unsigned long long>(b.size)));
    auto describe = [&](uint64_t at) {
        return Where{"buffer", text("buffer %d", static_cast<int>(index)), at, true};
    };
    if (p & ((flags & umfa_access_alignment) - 1))
        check_alignment(p, flags, site, describe(static_cast<uint64_t>(offset)));
    if (write) {
        b.written = true;
        R.counters.buffer_written[index] += size;
    } else {
        R.counters.buffer_read[index] += size;
    }
    if (b.tracked && R.device_epoch < kMaxEpoch) {
        const Simdgroup& s = own_simdgroup();
        track(b.stamps, static_cast<uint64_t>(offset), size, flags, R.device_epoch,
              R.device_barrier_epoch, s.device_epoch, R.device_group_epoch, true, describe, site);
    }
}

void threadgroup_access(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    Region* g = R.last_region;
    if (g == nullptr || p - g->begin >= g->size) {
        g = nullptr;
        for (Region& candidate : R.regions)
            if (p - candidate.begin < candidate.size) g = &candidate;
    }
    const bool write = flags & umfa_access_write;
    auto name = [](const Region& region) {
        return region.name ? text("threadgroup variable '%s'", region.name)
                           : text("threadgroup memory %d", region.index);
    };
    if (g == nullptr || p + size > g->begin + g->size) {
        // Name the nearest region below, with which the pointer probably began.
        const Region* near = g;
        for (const Region& candidate : R.regions)
            if (near == nullptr ||
                (candidate.begin <= p && (near->begin > p || candidate.begin > near->begin)))
                near = &candidate;
        fail("out of bounds", site,
             thread_text(*current()) + (write ? " writes " : " reads ") +
                 (near == nullptr
                      ? std::string("threadgroup memory that the dispatch did not ask for")
                      : text("%u bytes at byte %lld of ", size,
                             static_cast<long long>(p - near->begin)) +
                            name(*near) +
                            text(", which has %llu bytes",
                                 static_cast<unsigned long long>(near->size))));
    }
    R.last_region = g;
    const uint64_t offset = p - g->begin;
    auto describe = [&](uint64_t at) {
        return Where{"threadgroup", name(*g), at - g->shadow, false};
    };
    if (p & ((flags & umfa_access_alignment) - 1))
        check_alignment(p, flags, site, describe(g->shadow + offset));
    if (!write || (flags & umfa_access_atomic && flags & umfa_access_read)) {
        const uint32_t* w = &R.threadgroup_stamps.write[g->shadow + offset];
        for (uint32_t i = 0; i < size; i++) {
            if (w[i] >> kThreadBits < R.group_epoch)
                fail("uninitialised threadgroup memory", site,
                     thread_text(*current()) + " reads " + name(*g) +
                         text(" at byte %llu, which no thread of this threadgroup has written",
                              static_cast<unsigned long long>(offset + i)));
        }
    }
    track(R.threadgroup_stamps, g->shadow + offset, size, flags, R.epoch, R.barrier_epoch,
          own_simdgroup().threadgroup_epoch, R.group_epoch, false, describe, site);
}

// Quiet NaNs in every float format, and a large odd integer.
void poison(char* p, size_t n) { memset(p, 0xff, n); }

}  // namespace

// ---------------------------------------------------------------------------------------------
// What kernels call

extern "C" {

void umfa_access_1(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    if (R.running) device_access(p, size, flags, site, false);
}
void umfa_access_2(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    if (R.running) device_access(p, size, flags, site, true);
}
void umfa_access_3(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    if (R.running) threadgroup_access(p, size, flags, site);
}

void umfa_rendezvous(void* slot, umfa_combine combine, unsigned kind) {
    rendezvous(slot, combine, kind);
}

unsigned umfa_active_lanes(void) { return own_simdgroup().live; }

void umfa_inactive_lane(unsigned lane) {
    fail("inactive lanes", R.combining->site,
         text("a lane of simdgroup %u in threadgroup (%u,%u,%u) reads from lane %u, which takes no "
              "part in the operation",
              R.combining->self.simdgroup, R.launch.threadgroup[0], R.launch.threadgroup[1],
              R.launch.threadgroup[2], lane));
}

void umfa_converge(const void* pointer, unsigned long stride) {
    if (!R.d->checks) return;
    Fiber* f = current();
    const Simdgroup& s = own_simdgroup();
    if (s.size != kLanes)
        fail("inactive lanes", umfa_site,
             text("simdgroup matrices need all 32 lanes of the simdgroup; this one has %u",
                  s.size));
    uint64_t h = f->trail ^ umfa_site;
    h = (h ^ reinterpret_cast<uint64_t>(pointer)) * 0x9e3779b97f4a7c15ULL;
    h = (h ^ stride ^ h >> 29) * 0xbf58476d1ce4e5b9ULL;
    f->trail = h;
    f->trail_site = umfa_site;
}

void umfa_check_uniform(unsigned long value) {
    if (!R.d->checks) return;
    current()->uniform = value;
}

void umfa_threadgroup_barrier(unsigned flags) {
    Fiber* f = current();
    Simdgroup& s = own_simdgroup();
    f->site = umfa_site;
    if (R.waiting == 0) {
        R.barrier_site = umfa_site;
        R.barrier_flags = flags;
        R.counters.threadgroup_barriers++;
        if (R.live != R.threads) {
            const Fiber* gone = f;
            for (unsigned i = 0; i < R.threads; i++)
                if (R.fibers[i].state == State::done) gone = &R.fibers[i];
            fail("divergent barrier", umfa_site,
                 thread_text(*gone) + " returned before the threadgroup barrier that " +
                     thread_text(*f) + " waits at");
        }
    } else if (R.barrier_site != umfa_site) {
        const Fiber* other = f;
        for (unsigned i = 0; i < R.threads; i++)
            if (R.fibers[i].state == State::at_barrier) other = &R.fibers[i];
        fail("divergent barrier", umfa_site,
             thread_text(*f) + " is at the barrier of " + site_text(umfa_site) + " while " +
                 thread_text(*other) + " is at that of " + site_text(other->site));
    }
    if (s.arrived != 0) {
        const Fiber* other = f;
        for (unsigned i = 0; i < s.ring_size; i++)
            if (s.ring[i]->state == State::at_simd) other = s.ring[i];
        fail("divergent barrier", umfa_site,
             thread_text(*f) + " is at a threadgroup barrier while " + thread_text(*other) +
                 " of the same simdgroup is at the operation of " + site_text(other->site));
    }
    f->state = State::at_barrier;
    s.waiting++;
    if (++R.waiting == R.live) {
        release_barrier();
        if (R.d->schedule_seed) {
            Fiber* next = any_ready();
            switch_to(next);
        }
    } else {
        hand_over(s);
    }
}

static void simdgroup_barrier_2(umfa_lane_slots* slots) {
    Simdgroup& s = own_simdgroup();
    const unsigned flags = *static_cast<unsigned*>(slots->slot[__builtin_ctz(slots->active)]);
    R.counters.simdgroup_barriers++;
    if (flags & 2) s.threadgroup_epoch = ++R.epoch;
    if (flags & 1) s.device_epoch = ++R.device_epoch;
}

void umfa_simdgroup_barrier(unsigned flags) { rendezvous(&flags, simdgroup_barrier_2, 2); }

void umfa_check_max_threads(unsigned long limit) {
    if (R.threads > limit)
        fail("too many threads", umfa_site,
             text("%u threads per threadgroup; the kernel's max_total_threads_per_threadgroup is "
                  "%lu",
                  R.threads, limit));
}

void* umfa_buffer(unsigned index, unsigned long element_size, unsigned alignment) {
    (void)element_size;
    (void)alignment;
    if (index >= kBuffers) return R.slots + kSlotBytes * kBuffers + kSlotBytes / 2;
    return R.buffers[index].data;
}

void* umfa_threadgroup_memory(unsigned index) {
    for (const Region& g : R.regions)
        if (g.name == nullptr && g.index == static_cast<int>(index))
            return reinterpret_cast<void*>(g.begin);
    return nullptr;
}

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
        default: return 0;
    }
}

// ---------------------------------------------------------------------------------------------
// Matrices

struct MatrixSlot {
    void* d;
    const void *a, *b, *c;
    unsigned types;
};

static inline float bfloat_to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float r;
    memcpy(&r, &bits, 4);
    return r;
}
static inline uint16_t float_to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Compilers call this for float to bfloat, and not every system's library has it. The result comes
// back where any 16-bit float does.
__attribute__((weak)) _Float16 __truncsfbf2(float x) {
    const uint16_t bits = float_to_bfloat(x);
    _Float16 r;
    memcpy(&r, &bits, 2);
    return r;
}

static inline void load_pair(float* to, const void* from, unsigned type) {
    if (type == 2) {
        memcpy(to, from, 8);
    } else if (type == 0) {
        _Float16 h[2];
        memcpy(h, from, 4);
        to[0] = static_cast<float>(h[0]);
        to[1] = static_cast<float>(h[1]);
    } else {
        uint16_t h[2];
        memcpy(h, from, 4);
        to[0] = bfloat_to_float(h[0]);
        to[1] = bfloat_to_float(h[1]);
    }
}
static inline void store_pair(void* to, const float* from, unsigned type) {
    if (type == 2) {
        memcpy(to, from, 8);
    } else if (type == 0) {
        const _Float16 h[2] = {static_cast<_Float16>(from[0]), static_cast<_Float16>(from[1])};
        memcpy(to, h, 4);
    } else {
        const uint16_t h[2] = {float_to_bfloat(from[0]), float_to_bfloat(from[1])};
        memcpy(to, h, 4);
    }
}

static void multiply_lanes(umfa_lane_slots* slots) {
    alignas(32) float a[64], b[64], c[64];
    const unsigned types = static_cast<MatrixSlot*>(slots->slot[0])->types;
    for (unsigned n = 0; n < kLanes; n++) {
        const MatrixSlot& m = *static_cast<MatrixSlot*>(slots->slot[n]);
        const unsigned at = R.map_row[n] * 8 + R.map_column[n];
        load_pair(a + at, m.a, types >> 2 & 3);
        load_pair(b + at, m.b, types >> 4 & 3);
        load_pair(c + at, m.c, types >> 6 & 3);
    }
    typedef float row __attribute__((vector_size(32)));
    row* rows = reinterpret_cast<row*>(c);
    const row* brows = reinterpret_cast<const row*>(b);
    for (int i = 0; i < 8; i++) {
        row sum = rows[i];
        for (int k = 0; k < 8; k++) {
            const int kk = R.d->reverse_reductions ? 7 - k : k;
            sum += a[i * 8 + kk] * brows[kk];
        }
        rows[i] = sum;
    }
    for (unsigned n = 0; n < kLanes; n++) {
        const MatrixSlot& m = *static_cast<MatrixSlot*>(slots->slot[n]);
        store_pair(m.d, c + R.map_row[n] * 8 + R.map_column[n], types & 3);
    }
    R.counters.mma++;
}

void umfa_matrix_multiply(void* d, const void* a, const void* b, const void* c, unsigned types) {
    MatrixSlot slot{d, a, b, c, types};
    rendezvous(&slot, multiply_lanes, 1);
}

// ---------------------------------------------------------------------------------------------
// Functions

// Up to `ulps` units in the last place, up or down, decided by the argument alone.
static float noisy(float x, float r, unsigned accuracy, float ulps) {
    if (accuracy != 0 || !R.d->math_noise || !(std::fabs(r) < INFINITY) || r == 0) return r;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t h = (bits ^ bits >> 15) * 0x2c1b3c6dU;
    h = (h ^ h >> 12) * 0x297a2d39U;
    h ^= h >> 15;
    const int n = static_cast<int>(ulps);
    const int k = static_cast<int>(h % static_cast<uint32_t>(2 * n + 1)) - n;
    int32_t out;
    memcpy(&out, &r, 4);
    out += k;
    float y;
    memcpy(&y, &out, 4);
    return std::fabs(y) < INFINITY ? y : r;
}

// The bounds are those of Metal's fast functions.
float umfa_exp(float x, unsigned a) {
    R.counters.exp++;
    return noisy(x, expf(x), a, 3 + std::floor(std::min(std::fabs(2 * x), 1e4f)));
}
float umfa_exp2(float x, unsigned a) {
    R.counters.exp2++;
    return noisy(x, exp2f(x), a, 3 + std::floor(std::min(std::fabs(2 * x), 1e4f)));
}
float umfa_exp10(float x, unsigned a) {
    R.counters.exp++;
    return noisy(x, powf(10.0f, x), a, 3 + std::floor(std::min(std::fabs(2 * x), 1e4f)));
}
#define UMFA_RUNTIME_1(name, function, ulps) \
    float umfa_##name(float x, unsigned a) { return noisy(x, function(x), a, ulps); }
UMFA_RUNTIME_1(log, logf, 3)
UMFA_RUNTIME_1(log2, log2f, 2)
UMFA_RUNTIME_1(log10, log10f, 3)
UMFA_RUNTIME_1(sin, sinf, 4)
UMFA_RUNTIME_1(cos, cosf, 4)
UMFA_RUNTIME_1(tan, tanf, 6)
UMFA_RUNTIME_1(asin, asinf, 5)
UMFA_RUNTIME_1(acos, acosf, 5)
UMFA_RUNTIME_1(atan, atanf, 5)
UMFA_RUNTIME_1(sinh, sinhf, 5)
UMFA_RUNTIME_1(cosh, coshf, 5)
UMFA_RUNTIME_1(asinh, asinhf, 5)
UMFA_RUNTIME_1(acosh, acoshf, 5)
UMFA_RUNTIME_1(atanh, atanhf, 5)
float umfa_rsqrt(float x, unsigned a) { return noisy(x, 1.0f / sqrtf(x), a, 2); }
float umfa_tanh(float x, unsigned a) {
    // Fast tanh is (t - 1) / (t + 1) with t = exp(2x): past 44 it is inf / inf.
    if (a == 0 && R.d->math_noise) {
        const float t = expf(2 * x);
        return (t - 1) / (t + 1);
    }
    return tanhf(x);
}
float umfa_pow(float x, float y, unsigned a) { return noisy(x, powf(x, y), a, 16); }
float umfa_atan2(float y, float x, unsigned a) { return noisy(x, atan2f(y, x), a, 6); }
float umfa_fmod(float x, float y) { return fmodf(x, y); }

// ---------------------------------------------------------------------------------------------
// Dispatch

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

static char* reserve(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes, PROT_NONE, flags, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
}

static void prepare_memory() {
    if (R.slots == nullptr) {
        R.slots = reserve(kSlots * kSlotBytes);
        if (R.slots == nullptr) abort();
        for (int i = 0; i < kBuffers; i++) R.buffers[i] = Buffer{};
    }
    for (int i = 0; i < kBuffers; i++) {
        Buffer& b = R.buffers[i];
        char* middle = R.slots + kSlotBytes * static_cast<uint64_t>(i) + kSlotBytes / 2;
        const umfa_binding& binding = R.d->buffers[i];
        b.bound = binding.data != nullptr || binding.size != 0;
        b.written = false;
        b.size = binding.size;
        b.data = middle + binding.misalignment;
        b.tracked = false;
        if (!b.bound) continue;
        const uint64_t needed = (binding.misalignment + binding.size + 65535) & ~65535ULL;
        if (needed > b.mapped) {
            mprotect(middle, needed, PROT_READ | PROT_WRITE);
            b.mapped = needed;
        }
        memcpy(b.data, binding.data, binding.size);
        if (R.d->checks && binding.may_write) {
            b.tracked = true;
            b.stamps.resize(binding.size);
        }
    }
    if (R.fibers == nullptr) {
        R.fibers = static_cast<Fiber*>(calloc(kMaxThreads, sizeof(Fiber)));
        R.stacks = reserve(kMaxThreads * kStackBytes);
        if (R.stacks == nullptr) abort();
    }
}

static bool prepare_threadgroup_memory() {
    R.regions.clear();
    R.last_region = nullptr;
    uint64_t total = 0;
    for (unsigned i = 0; i < R.d->variable_count; i++) {
        const umfa_variable& v = R.d->variables[i];
        R.regions.push_back({reinterpret_cast<uint64_t>(v.address), v.size, v.name, -1,
                             static_cast<uint32_t>(total)});
        total += v.size;
    }
    uint64_t dynamic = 0;
    for (int i = 0; i < kBuffers; i++) dynamic += (R.d->threadgroup_bytes[i] + 4095) / 4096 + 2;
    R.arena.resize(dynamic * 4096);
    uint64_t at = (reinterpret_cast<uint64_t>(R.arena.data()) + 4095) & ~4095ULL;
    for (int i = 0; i < kBuffers; i++) {
        const uint64_t size = R.d->threadgroup_bytes[i];
        if (size == 0) continue;
        R.regions.push_back({at, size, nullptr, i, static_cast<uint32_t>(total)});
        total += size;
        at += (size + 8191) & ~4095ULL;  // at least a page between two of them
    }
    R.counters.threadgroup_memory = total;
    R.threadgroup_stamps.resize(total);
    return total <= kMaxThreadgroupBytes;
}

static void run_threadgroup(uint32_t number) {
    const umfa_dispatch& d = *R.d;
    R.launch.threadgroup[0] = number % d.threadgroups[0];
    R.launch.threadgroup[1] = number / d.threadgroups[0] % d.threadgroups[1];
    R.launch.threadgroup[2] = number / d.threadgroups[0] / d.threadgroups[1];
    R.live = R.threads;
    R.waiting = 0;
    if (R.epoch > kMaxEpoch / 2) {
        R.threadgroup_stamps.resize(R.threadgroup_stamps.write.size());
        R.epoch = 0;
    }
    R.group_epoch = R.barrier_epoch = ++R.epoch;
    R.device_group_epoch = R.device_barrier_epoch = ++R.device_epoch;
    R.group_epochs.push_back(R.device_epoch);
    R.group_numbers.push_back(number);
    for (const Region& g : R.regions) poison(reinterpret_cast<char*>(g.begin), g.size);
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
        f.site = f.trail_site = 0;
        f.trail = f.uniform = 0;
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
    R.counters = umfa_counters{};
    umfa_counts = umfa_static_counters{};
    R.failed = false;
    R.error.clear();
    R.random = dispatch->schedule_seed * 0x9e3779b97f4a7c15ULL + 0x853c49e6748fea9bULL;
    R.threads = dispatch->threads[0] * dispatch->threads[1] * dispatch->threads[2];
    R.error_site = 0;
    fill_lane_map();
    prepare_memory();
    R.epoch = R.device_epoch = 0;
    R.group_epochs.clear();
    R.group_numbers.clear();
    const bool fits = prepare_threadgroup_memory();
    if (!fits) {
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
        const uint32_t total = dispatch->threadgroups[0] * dispatch->threadgroups[1] *
                               dispatch->threadgroups[2];
        std::vector<uint32_t> order(total);
        for (uint32_t i = 0; i < total; i++) order[i] = i;
        if (dispatch->schedule_seed) {
            for (uint32_t i = total; i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
        }
        const unsigned old = set_flush(dispatch->flush_to_zero);
        R.running = true;
        for (uint32_t i = 0; i < total && !R.failed; i++) run_threadgroup(order[i]);
        R.running = false;
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
