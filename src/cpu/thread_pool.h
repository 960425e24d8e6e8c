// A small pool of threads shared by every call in the process.
#pragma once

#include <cstdint>
#include <memory>

#include "core/instruments.h"

namespace umfa::cpu {

/// num_threads(), or 1 where waking others costs more than they would save: `operations` is the
/// number of multiplications, or of floats moved.
int threads_worth(double operations);

/// Runs task(context, index) for every index in [0, count), in any order, on up to `threads`
/// threads of which the caller is one. Returns when all are done; rethrows the first exception.
/// Safe to call from many threads at once, and in a child after fork().
void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t index),
                  void* context);

template <class F>
void parallel_for(int64_t count, int threads, F&& body) {
    parallel_for(
        count, threads, [](void* context, int64_t index) { (*static_cast<F*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

/// This thread's scratch memory: at least `floats` floats, 64-byte aligned, kept between calls.
float* thread_scratch(int64_t floats);
/// The same for what one call's tasks share: only the thread that runs parallel_for asks for it.
float* call_scratch(int64_t floats);

}  // namespace umfa::cpu
