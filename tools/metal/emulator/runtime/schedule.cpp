// Who runs next, where threads meet, and what is wrong when they do not.
//
// The lanes of a simdgroup form a ring. A lane that arrives at a rendezvous hands over to the next
// in the ring; the last to arrive does the work of all and goes on. So a simdgroup operation costs
// one switch per lane.

#include <cstdlib>
#include <cstring>
#include <utility>

#include "state.h"

namespace umfa_runtime {

#if defined(__x86_64__)
constexpr int kSavedRegisters = 6;  // that umfa_switch pops
#endif

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
        __builtin_prefetch(next->stack);
        if (next->state == State::ready) return switch_to(next);
    }
    Fiber* other = any_ready();
    if (other == nullptr) fail("deadlock", f->site, "no thread can go on");
    switch_to(other);
}

[[noreturn]] void fail_trails(const Fiber& a, const Fiber& b) {
    const Fiber& last = b.trail_site ? b : a;
    fail("divergent simdgroup operation", last.trail_site,
         "lanes of one simdgroup came through simdgroup_load or simdgroup_store operations that "
         "are not the same, or have other pointers or strides: " +
             thread_text(a) + " was last at " + site_text(a.trail_site) + ", " + thread_text(b) +
             " at " + site_text(b.trail_site));
}

// One of those that take part: the current lane may have returned, and waits for nothing.
const Fiber* any_at_simd(const Simdgroup& s) {
    const Fiber* f = current();
    for (unsigned i = 0; i < s.ring_size && f->state == State::done; i++)
        if (s.ring[i]->state == State::at_simd) f = s.ring[i];
    return f;
}

void check_trails(Simdgroup& s) {
    const Fiber* first = s.first_done;
    const Fiber* part = any_at_simd(s);
    for (unsigned i = 0; i < s.ring_size; i++) {
        const Fiber* f = s.ring[i];
        if (f->state == State::done) continue;
        if (first == nullptr) first = f;
        if (f->state == State::at_simd || f == current()) {
            if (s.kind == 3 && f->uniform != part->uniform && checks(umfa_checks_uniform))
                fail("non-uniform shuffle", f->site,
                     text("%s passes %llu as the lane, mask or delta, %s passes %llu",
                          thread_text(*f).c_str(), static_cast<unsigned long long>(f->uniform),
                          thread_text(*part).c_str(),
                          static_cast<unsigned long long>(part->uniform)));
        }
        if (f->trail != first->trail && checks(umfa_checks_divergence)) fail_trails(*first, *f);
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

// Where divergence is allowed, the lanes at one place are the active ones. Of several places the
// first in the code is served first, so that a branch ends before what follows it.
void complete_part(Simdgroup& s) {
    Fiber* first = nullptr;
    for (unsigned i = 0; i < s.ring_size; i++) {
        Fiber* f = s.ring[i];
        if (f->state == State::at_simd && (first == nullptr || f->site < first->site)) first = f;
    }
    s.slots.active = 0;
    unsigned active = 0;
    for (unsigned i = 0; i < s.ring_size; i++) {
        Fiber* f = s.ring[i];
        if (f->state != State::at_simd || f->site != first->site || f->combine != first->combine)
            continue;
        s.slots.slot[f->self.lane] = f->slot;
        s.slots.active |= 1U << f->self.lane;
        f->state = State::ready;
        active++;
        if (first->kind == 3 && f->uniform != first->uniform && checks(umfa_checks_uniform))
            fail("non-uniform shuffle", f->site, "lanes pass different lanes, masks or deltas");
        if (f != first) f->uniform = 0;
    }
    first->uniform = 0;
    s.arrived -= active;
    if (first->kind == 1 && active != kLanes)
        fail("inactive lanes", first->site,
             text("this operation needs all 32 lanes of the simdgroup; %u take part", active));
    if (first->kind == 0) R.counters.simd_operations++;
    if (first->kind == 3) R.counters.shuffles++;
    R.combining = first;
    if (first->combine != nullptr) first->combine(&s.slots);
    s.slots.active = 0;
}

bool all_meet(const Simdgroup& s) { return s.arrived != 0 && s.arrived + s.waiting == s.live; }

void rendezvous_in_parts(void* slot, umfa_combine combine, unsigned kind) {
    Fiber* f = current();
    Simdgroup& s = own_simdgroup();
    f->site = umfa_site;
    f->slot = slot;
    f->combine = combine;
    f->kind = kind;
    f->state = State::at_simd;
    s.arrived++;
    if (all_meet(s)) complete_part(s);
    if (f->state == State::at_simd) hand_over(s);
}

void rendezvous(void* slot, umfa_combine combine, unsigned kind) {
    count_step(umfa_site);
    if (!checks(umfa_checks_divergence)) return rendezvous_in_parts(slot, combine, kind);
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
             thread_text(*f) + " is at " + site_text(umfa_site) + " while " + thread_text(*other) +
                 " of the same simdgroup is at " + site_text(other->site));
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
    if (checks(umfa_checks_divergence)) {
        for (Simdgroup& s : R.simdgroups) check_trails(s);
    }
    if (R.barrier_flags & 2) report_unwritten_read();
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
    const bool strict = checks(umfa_checks_divergence);
    if (strict && f->trail != s.first_done->trail) fail_trails(*s.first_done, *f);
    if (strict && R.waiting != 0) {
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
    if (R.live == 0) {
        report_unwritten_read();
        umfa_switch(&dropped, R.main_stack);
    }
    if (!strict) {
        if (R.waiting == R.live) release_barrier();
        if (all_meet(s)) complete_part(s);
    } else if (s.arrived != 0 && s.arrived == s.live) {
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
}  // namespace umfa_runtime

using namespace umfa_runtime;

extern "C" {

void umfa_rendezvous(void* slot, umfa_combine combine, unsigned kind) {
    rendezvous(slot, combine, kind);
}

void umfa_inactive_lane(unsigned lane) {
    if (!checks(umfa_checks_lanes)) return;
    fail("inactive lanes", R.combining->site,
         text("a lane of simdgroup %u in threadgroup (%u,%u,%u) reads from lane %u, which takes no "
              "part in the operation",
              R.combining->self.simdgroup, R.launch.threadgroup[0], R.launch.threadgroup[1],
              R.launch.threadgroup[2], lane));
}

void umfa_past_edge(int lane) {
    if (!checks(umfa_checks_edge)) return;
    fail("shuffle past the edge", umfa_site,
         thread_text(*current()) +
             text(" asks for the value of lane %d, which its group does not have", lane));
}

void umfa_converge(const void* pointer, unsigned long stride) {
    Fiber* f = current();
    const Simdgroup& s = own_simdgroup();
    if (s.size != kLanes && checks(umfa_checks_lanes))
        fail(
            "inactive lanes", umfa_site,
            text("simdgroup matrices need all 32 lanes of the simdgroup; this one has %u", s.size));
    uint64_t h = f->trail ^ umfa_site;
    h = (h ^ reinterpret_cast<uint64_t>(pointer)) * 0x9e3779b97f4a7c15ULL;
    h = (h ^ stride ^ h >> 29) * 0xbf58476d1ce4e5b9ULL;
    f->trail = h;
    f->trail_site = umfa_site;
}

void umfa_check_uniform(unsigned long value) { current()->uniform = value; }

static void barrier_in_parts(unsigned flags) {
    Fiber* f = current();
    Simdgroup& s = own_simdgroup();
    f->site = umfa_site;
    R.barrier_flags = R.waiting == 0 ? flags : R.barrier_flags & flags;
    R.counters.threadgroup_barriers += R.waiting == 0;
    f->state = State::at_barrier;
    s.waiting++;
    if (++R.waiting == R.live) return release_barrier();
    if (all_meet(s)) complete_part(s);
    hand_over(s);
}

void umfa_threadgroup_barrier(unsigned flags) {
    count_step(umfa_site);
    if (!checks(umfa_checks_divergence)) return barrier_in_parts(flags);
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
    if (flags & 2) report_unwritten_read();
    if (flags & 2) s.threadgroup_epoch = ++R.epoch;
    if (flags & 1) s.device_epoch = ++R.device_epoch;
}

void umfa_simdgroup_barrier(unsigned flags) { rendezvous(&flags, simdgroup_barrier_2, 2); }

void umfa_check_max_threads(unsigned long limit) {
    if (R.threads > limit && checks(umfa_checks_limits))
        fail("too many threads", umfa_site,
             text("%u threads per threadgroup; the kernel's max_total_threads_per_threadgroup is "
                  "%lu",
                  R.threads, limit));
}

}  // extern "C"
