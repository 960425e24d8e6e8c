// What the core asks of a backend. Routing reads these tables; there is no other list of features.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/backward.h"
#include "core/combine.h"
#include "core/player.h"
#include "core/problem.h"
#include "core/quantize.h"
#include "core/self_test.h"
#include "core/tuning.h"

namespace umfa {

/// An answer with its reason: empty when yes.
struct Verdict {
    bool yes = true;
    std::string reason;
};

/// Compiled kernels of a call.
struct Kernels {
    int64_t used = 0;   // different ones
    int64_t built = 0;  // of them, those that this process did not have ready
};

/// How a backend runs one operation. `P` describes the computation, P::Results what is written.
template <class P>
struct Operation {
    uint32_t features = 0;               // bitwise or of `Feature`s
    Verdict (*can)(const P&) = nullptr;  // what features do not say; null: everything
    /// Null: the backend has no such operation.
    void (*run)(const P&, const typename P::Results&) = nullptr;
    /// Records the work in the caller's stream (an id<MTLCommandBuffer>), and neither commits it nor
    /// waits. The tensors' memory must stay until the stream has run. Null: there are no streams.
    void (*encode)(const P&, const typename P::Results&, void* stream) = nullptr;
    /// Whether "auto" may choose it before other backends for tensors in host memory; null: always.
    bool (*worthwhile)(const P&) = nullptr;
    /// Whether the self-test of this machine's device passed for it. Checked last, since it may run
    /// the self-test. Null: yes.
    Verdict (*trusted)(const P&) = nullptr;
    /// Whether `trusted` may run the self-test or wait for it.
    bool (*may_wait)(const P&) = nullptr;
    /// Compiles the kernels that `run` would use, and computes nothing: results need no memory.
    /// Null: the backend compiles nothing at run time.
    Kernels (*prepare)(const P&, const typename P::Results&) = nullptr;
    /// For a call that another backend can run, where the caller has named none: whether that backend
    /// should. True the first time that a call needs some kernels, which it starts to compile in the
    /// background; does not wait. Null: never.
    bool (*postpone)(const P&) = nullptr;
    /// Hands the launches to a player. False if it takes none of them. Null: there are no launches.
    bool (*play)(const P&, const typename P::Results&, Player&) = nullptr;
};

struct Backend {
    const char* name;
    Verdict (*available)();   // whether it is there, on this machine and in this build
    bool (*can_see)(Device);  // whether it can read tensors on that device
    Operation<Problem> forward;
    Operation<CombineProblem> combine;
    Operation<BackwardProblem> backward;
    Operation<QuantizeProblem> quantize;
    Operation<DequantizeProblem> dequantize;

    // Of a backend whose device is not the CPU; else null.
    /// Memory that `TensorView::data` can name on the device; throws `Error` when there is none.
    void* (*allocate)(uint64_t bytes, std::string_view function) = nullptr;
    void (*deallocate)(void* memory) = nullptr;
    /// Where the host reads and writes what `allocate` returned.
    void* (*contents)(void* memory) = nullptr;
    /// The device in words; empty when there is none.
    std::string (*describe)() = nullptr;
    /// Outcomes of the device's self-test; empty without a device. `run`: tests each untested
    /// dtype; without it, never waits. Throws `Error` if UMFA_SELF_TEST is invalid.
    SelfTestReports (*self_tests)(bool run) = nullptr;
    /// The choices in use.
    Tuned (*tuning)() = nullptr;
    /// Uses other values in this process. `keep`: also in later ones. Returns what is then in use.
    /// Throws `Error` without a device, or if a value is out of range.
    Tuned (*tune)(const Tuned&, bool keep) = nullptr;
};

namespace cpu {
extern const Backend backend;
}
namespace metal {
extern const Backend backend;  // in every build: metal/unavailable.cpp where there is no Metal
}

}  // namespace umfa
