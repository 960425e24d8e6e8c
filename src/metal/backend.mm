// The Metal backend, as the routing sees it.
#include "core/error.h"
#include "core/instruments.h"
#import "metal/autorelease.h"
#import "metal/background.h"
#import "metal/context.h"
#import "metal/executor.h"
#include "metal/host.h"
#include "metal/plan_backward.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/plan_quantize.h"
#include "metal/plan_tiles.h"
#include "metal/switches.h"
#include "metal/trust.h"
#include "metal/tuning.h"

namespace umfa::metal {
namespace {

double worthwhile_flop(std::string_view caller) {
    return Context::current(caller)->tuned().values.worthwhile_flop;
}

bool worthwhile(const Problem& problem) {
    return flop_of(problem) >= worthwhile_flop(problem.function);
}

/// Five products instead of two.
bool backward_is_worthwhile(const BackwardProblem& problem) {
    return 2.5 * flop_of(problem.forward) >= worthwhile_flop(problem.forward.function);
}

/// A merge and quantising read each element once or twice: on host memory the CPU needs no longer, and
/// no launch.
template <class P>
bool never_worthwhile(const P&) {
    return false;
}

Verdict available() {
    check_environment();
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
           (metallib().empty() ? ", kernels compiled when first used"
                               : ", kernels compiled ahead") +
           (compiles_in_background() ? "; some are being compiled now" : "");
}

Tuned tuning() {
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current("umfa.tune");
    Tuned tuned = context->tuned();
    tuned.tile_choices = tile_choices(context->capabilities());
    return tuned;
}

Tuned tune(const Tuned& wanted, bool keep) {
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current("umfa.tune");
    check_tuning(wanted.values);
    Tuned tuned{wanted.values, {}, {}, {}, wanted.measured, {}, {}, {}};
    if (keep) keep_tuning(describe(context->gpu()), tuned);
    context->tune(tuned);
    return tuned;
}

}  // namespace

const Backend backend{
    "metal",
    available,
    [](Device) { return true; },  // host memory is the GPU's too
    {forward_features, can_plan_forward, forward, encode_forward, worthwhile, trusts_forward,
     forward_may_wait, prepare_forward, postpone_forward, play_forward},
    {0, can_plan_combine, combine, nullptr, never_worthwhile<CombineProblem>, trusts_combine,
     combine_may_wait, prepare_combine, nullptr, play_combine},
    {backward_features, can_plan_backward, backward, nullptr, backward_is_worthwhile,
     trusts_backward, backward_may_wait, nullptr, nullptr, play_backward},
    {0, can_plan_quantize, quantize, nullptr, never_worthwhile<QuantizeProblem>, trusts_quantize,
     quantize_may_wait, nullptr, nullptr, play_quantize},
    {0, can_plan_dequantize, dequantize, nullptr, never_worthwhile<DequantizeProblem>,
     trusts_dequantize, dequantize_may_wait, nullptr, nullptr, play_dequantize},
    allocate,
    deallocate,
    contents,
    describe_device,
    self_tests,
    tuning,
    tune};

void release() {
    wait_for_background();  // its threads hold the context
    Context::release();
}

}  // namespace umfa::metal
