// All that the parts of the runtime share: threads as fibers, simdgroups, buffers, the dispatch.
// There is one of each in a process, so one dispatch runs at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "interface.h"

// Stores the caller's stack and goes on with another (switch.cpp).
extern "C" void umfa_switch(void** from, void* to);

namespace umfa_runtime {

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

// A stamp is an epoch and a thread: who touched a byte, and since which barrier.
constexpr uint32_t kThreadBits = 10;
constexpr uint32_t kMaxEpoch = (1U << (32 - kThreadBits)) - 1;

enum class State : uint8_t { ready, at_simd, at_barrier, done };

struct Simdgroup;

struct Fiber {
    umfa_thread self;  // first: umfa_self points here
    unsigned index;    // in the threadgroup, x first
    unsigned position[3];
    State state;
    uint8_t ring;  // place in its simdgroup's ring
    void* stack;
    Simdgroup* simdgroup;
    uint32_t site;
    uint64_t trail;       // hash of the operations that need convergence but do not meet
    uint32_t trail_site;  // the last of them
    uint64_t uniform;     // must be the same in all lanes of the coming operation
    uint64_t steps_left;  // accesses, meetings and rounds of loops
    // What it waits to take part in, where lanes may meet in parts of a simdgroup.
    void* slot;
    umfa_combine combine;
    unsigned kind;
    char* memory;
};

// Of each byte four who touched it, so chosen that whoever conflicts with any conflicts with one of
// them: the last, one before it of the same simdgroup, one of another simdgroup, and the first of
// all, which stands for earlier threadgroups.
struct Touched {
    std::vector<uint32_t> last, beside, other, first;
    void resize(size_t n) {
        for (std::vector<uint32_t>* v : {&last, &beside, &other, &first}) v->assign(n, 0);
    }
};

// Atomic operations get along with each other, and are apart for that reason; most memory sees none.
struct Stamps {
    std::vector<uint32_t> write;  // the last writer: two would have conflicted
    Touched read, atomic_read, atomic_write;
    bool atomics = false;
    void resize(size_t n) {
        write.assign(n, 0);
        read.resize(n);
        atomics = false;
    }
    void expect_atomics() {
        if (atomics) return;
        atomic_read.resize(write.size());
        atomic_write.resize(write.size());
        atomics = true;
    }
};

struct Simdgroup {
    unsigned first;           // its first thread
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
    uint32_t checks;
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
    // The first read of threadgroup memory that nobody had written. Who writes it later with no
    // barrier between is the cause, so the report waits for one of them.
    bool unwritten_read;
    std::string unwritten_text;
    uint32_t unwritten_site;
    unsigned map_row[kLanes], map_column[kLanes];
    unsigned current_combine_site;
    Fiber* combining;
};

extern Runtime R;
inline bool checks(uint32_t which) { return (R.checks & which) != 0; }
inline Fiber* current() { return reinterpret_cast<Fiber*>(umfa_self); }

// dispatch.cpp
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string site_text(uint32_t site);
std::string thread_text(const Fiber& f);
/// Leaves the dispatch with an error; the fibers are simply not resumed.
[[noreturn]] void fail(const char* check, uint32_t site, const std::string& what);
char* reserve(size_t bytes);
/// Stops the dispatch at a read of threadgroup memory that was not written, if there was one.
void report_unwritten_read();

// faults.cpp
/// While it lives, faults of the processor end the dispatch, not the process.
class FaultGuard {
public:
    FaultGuard();
    ~FaultGuard();
    FaultGuard(const FaultGuard&) = delete;
    FaultGuard& operator=(const FaultGuard&) = delete;
};

// schedule.cpp
uint64_t next_random();
void build_ring(Simdgroup& s);
Fiber* any_ready();
void start_fiber(Fiber& f);
void rendezvous(void* slot, umfa_combine combine, unsigned kind);
inline Simdgroup& own_simdgroup() { return *current()->simdgroup; }

// memory.cpp
void fail_steps(uint32_t site);
inline void count_step(uint32_t site) {
    if (--current()->steps_left == 0) fail_steps(site);
}
bool prepare_memory();
bool prepare_threadgroup_memory();
void poison_threadgroup_memory();

}  // namespace umfa_runtime

extern "C" {
extern uint32_t umfa_site;  // of the operation that the kernel is about to call
extern umfa_static_counters umfa_counts;
}
