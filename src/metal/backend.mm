// The Metal backend, as the routing sees it.
#include "core/error.h"
#include "core/instruments.h"
#import "metal/autorelease.h"
#import "metal/context.h"
#import "metal/executor.h"
#include "metal/host.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/self_test.h"
#include "metal/trust.h"

namespace umfa::metal {
namespace {

/// Below this many FLOP a call on host memory stays on the CPU unless "metal" is asked for. Committing
/// a command buffer and waiting for it costs a fraction of a millisecond, in which the CPU kernels do
/// about this much. An estimate: it has not been measured on Apple hardware. The argument `backend`
/// and UMFA_BACKEND overrule it.
constexpr double worthwhile_flop = 2e7;

bool worthwhile(const Problem& problem) {
    double pairs = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const SequenceRows rows = problem.sequence(b);
        pairs += static_cast<double>(rows.seqlen_q) * static_cast<double>(rows.seqlen_kv);
    }
    const double flop = 2.0 * pairs * static_cast<double>(problem.nheads_q) *
                        static_cast<double>(problem.head_dim + problem.head_dim_v);
    return (problem.causal ? flop / 2 : flop) >= worthwhile_flop;
}

/// A merge reads each element once: on host memory the CPU needs no longer, and no launch.
bool combine_is_worthwhile(const CombineProblem&) { return false; }

Verdict available() {
    self_test_mode();  // an invalid value is an error without a usable GPU too
    return Context::available();
}

void* allocate(uint64_t bytes, std::string_view function) {
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current(function);
    id<MTLBuffer> buffer = [context->gpu().device newBufferWithLength:bytes
                                                              options:MTLResourceStorageModeShared];
    if (!buffer)
        fail(ErrorKind::memory, function, "no memory for a Metal buffer",
             std::to_string(bytes) + " bytes", "a smaller tensor");
    return (__bridge_retained void*)buffer;
}

void deallocate(void* memory) {
    const AutoreleasePool pool;
    id<MTLBuffer> buffer = (__bridge_transfer id<MTLBuffer>)memory;
    (void)buffer;
}

void* contents(void* memory) {
    const AutoreleasePool pool;
    id<MTLBuffer> buffer = (__bridge id<MTLBuffer>)memory;
    return buffer.contents;
}

std::string describe_device() {
    const AutoreleasePool pool;
    return describe(Context::current("umfa.backends")->gpu()) +
           (metallib().empty() ? ", kernels compiled when first used" : ", kernels compiled ahead");
}

}  // namespace

const Backend backend{"metal",
                      available,
                      [](Device) { return true; },  // host memory is the GPU's too
                      {forward_features, can_plan_forward, forward, encode_forward, worthwhile,
                       trusts_forward, forward_may_wait},
                      {0, can_plan_combine, combine, nullptr, combine_is_worthwhile, trusts_combine,
                       combine_may_wait},
                      allocate,
                      deallocate,
                      contents,
                      describe_device,
                      self_tests};

void release() { Context::release(); }

}  // namespace umfa::metal
