// What Python, the launchers and the runtime pass to each other. Plain C layout: Python mirrors it.
#pragma once

#include <stdint.h>

#define UMFA_CONVERGENT

extern "C" {

struct umfa_thread {
    unsigned lane, simdgroup, row, column;
};

struct umfa_lane_slots {
    void* slot[32];
    unsigned active, reverse;
};

typedef void (*umfa_combine)(umfa_lane_slots*);

extern umfa_thread* umfa_self;

enum umfa_access_flags : uint32_t {
    umfa_access_alignment = 0xfff,
    umfa_access_read = 1 << 12,
    umfa_access_write = 1 << 13,
    umfa_access_atomic = 1 << 14,
};

// Which checks may stop a dispatch; Python has them in this order (checks.py).
enum umfa_checks : uint32_t {
    umfa_checks_bounds = 1 << 0,
    umfa_checks_alignment = 1 << 1,
    umfa_checks_constants = 1 << 2,
    umfa_checks_uninitialised = 1 << 3,
    umfa_checks_race = 1 << 4,
    umfa_checks_divergence = 1 << 5,
    umfa_checks_uniform = 1 << 6,
    umfa_checks_lanes = 1 << 7,
    umfa_checks_edge = 1 << 8,
    umfa_checks_limits = 1 << 9,
    umfa_checks_division = 1 << 10,
    umfa_checks_steps = 1 << 11,
};

struct umfa_site_entry {
    const char* file;
    uint32_t line;
};

struct umfa_variable {  // of threadgroup memory, declared in a kernel
    void* address;
    uint64_t size;
    const char* name;
};

struct umfa_unset {  // a function constant without a value
    void* address;
    const char* name;
    uint32_t index;
};

struct umfa_binding {
    const void* data;
    uint64_t size;
    uint64_t offset;        // of what the kernel is given; memory before it stays in reach
    uint32_t misalignment;  // of the caller's address, kept so that misaligned views are seen
    uint32_t may_write;
};

struct umfa_launch_position {
    uint32_t threadgroup[3];
};

/// Counted in the kernel itself, once per basic block.
struct umfa_static_counters {
    uint64_t flops, fma;
    uint64_t device_read, device_written, constant_read, threadgroup_read, threadgroup_written;
};

struct umfa_counters {
    uint64_t mma, exp2, exp, shuffles, simd_operations;
    uint64_t threadgroup_barriers, simdgroup_barriers, threadgroups, threadgroup_memory;
    uint64_t buffer_read[31], buffer_written[31];
};

struct umfa_dispatch {
    void (*entry)(void);
    uint32_t threadgroups[3], threads[3];
    umfa_binding buffers[31];
    uint64_t threadgroup_bytes[31];
    const umfa_site_entry* sites;
    uint64_t site_count;
    const umfa_variable* variables;
    uint64_t variable_count;
    const umfa_unset* unset;
    uint64_t unset_count;
    uint64_t schedule_seed;
    uint64_t step_limit;  // of one thread: accesses and rounds of loops
    uint32_t checks, flush_to_zero, math_noise, reverse_reductions, permute_lanes, reserved;
};

struct umfa_result {
    umfa_counters counters;
    umfa_static_counters counts;
    const char* check;
    const char* error;
    uint64_t site;
};
}
