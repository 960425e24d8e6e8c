#import "metal/executor.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/stats.h"
#import "metal/autorelease.h"
#import "metal/buffers.h"
#import "metal/context.h"
#import "metal/plan_backward.h"
#import "metal/plan_combine.h"
#import "metal/plan_forward.h"
#import "metal/plan_quantize.h"
#include "metal/slices.h"
#import "metal/text.h"
#include "shared/params.h"

namespace umfa::metal {
namespace {

/// setBytes takes less than 4 KB.
constexpr size_t max_set_bytes = 4096;

/// A plan, with a pipeline for each of its launches.
struct Work {
    LaunchPlan plan;
    std::vector<Pipeline> pipelines;
    int64_t built = 0;  // pipelines that no earlier call had
};

/// Plans, and builds the pipelines. How many threads a pipeline takes shows only when it is built,
/// since it falls with the registers that Apple's compiler spends: a plan that asks for more is made
/// again for fewer.
Work prepare(Context& context, std::string_view caller, const Planner& plan) {
    Capabilities gpu = context.capabilities();
    int64_t built = 0;
    for (;;) {
        Work work{plan(gpu), {}};
        bool fits = true;
        for (const KernelLaunch& launch : work.plan.launches) {
            const Pipeline pipeline =
                context.pipelines().get(context.gpu(), launch, caller, &built);
            if (launch.params.size() >= max_set_bytes)
                fail(ErrorKind::internal, caller, "a kernel's parameters are too many",
                     std::to_string(launch.params.size()) + " bytes", "less than 4096");
            if (pipeline.threadgroup_bytes > gpu.max_threadgroup_bytes)
                fail(ErrorKind::unsupported, caller,
                     "the kernel " + launch.kernel + " needs more threadgroup memory than there is",
                     std::to_string(pipeline.threadgroup_bytes) + " bytes",
                     "at most " + std::to_string(gpu.max_threadgroup_bytes));
            const uint32_t threads =
                launch.threadgroup.x * launch.threadgroup.y * launch.threadgroup.z;
            if (threads > pipeline.max_threads) {
                if (gpu.max_threads <= pipeline.max_threads)
                    fail(ErrorKind::unsupported, caller,
                         "the kernel " + launch.kernel + " has no tile small enough for this GPU",
                         std::to_string(threads) + " threads",
                         "at most " + std::to_string(pipeline.max_threads));
                gpu.max_threads = pipeline.max_threads;
                fits = false;
                break;
            }
            work.pipelines.push_back(pipeline);
        }
        work.built = built;
        if (fits) return work;
    }
}

Kernels prepare_kernels(std::string_view caller, const Planner& plan) {
    const AutoreleasePool pool;
    const Work work = prepare(*Context::current(caller), caller, plan);
    std::vector<id<MTLComputePipelineState>> states;
    for (const Pipeline& pipeline : work.pipelines)
        if (std::find(states.begin(), states.end(), pipeline.state) == states.end())
            states.push_back(pipeline.state);
    return {static_cast<int64_t>(states.size()), work.built};
}

using Leases = std::vector<ScratchPool::Lease>;

Leases take_scratch(Context& context, const Work& work, std::string_view caller) {
    Leases leases;
    for (const uint64_t bytes : work.plan.scratch_bytes)
        leases.push_back(context.scratch().take(context.gpu().device, bytes, caller));
    return leases;
}

/// Buffers of the plan's data; nil for those small enough for setBytes.
std::vector<id<MTLBuffer>> upload(Context& context, const Work& work, std::string_view caller) {
    std::vector<id<MTLBuffer>> buffers;
    for (const std::vector<std::byte>& data : work.plan.data) {
        id<MTLBuffer> buffer = nil;
        if (data.size() >= max_set_bytes) {
            buffer = [context.gpu().device newBufferWithLength:data.size()
                                                       options:MTLResourceStorageModeShared];
            if (!buffer)
                fail(ErrorKind::memory, caller, "no memory for a table of sequences",
                     std::to_string(data.size()) + " bytes", "a smaller problem");
            std::memcpy(buffer.contents, data.data(), data.size());
        }
        buffers.push_back(buffer);
    }
    return buffers;
}

/// Ends the encoder also when an exception leaves: Metal aborts where one is still open.
class Encoder {
public:
    Encoder(id<MTLCommandBuffer> commands, std::string_view caller)
        : encoder_([commands computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent]) {
        if (!encoder_)
            fail(ErrorKind::device, caller, "Metal made no command encoder", "nil",
                 "a command buffer with no other encoder open");
    }
    ~Encoder() { [encoder_ endEncoding]; }
    Encoder(const Encoder&) = delete;
    Encoder& operator=(const Encoder&) = delete;
    id<MTLComputeCommandEncoder> get() const { return encoder_; }

private:
    id<MTLComputeCommandEncoder> encoder_;
};

MTLSize metal_size(const Size3& size) { return MTLSizeMake(size.x, size.y, size.z); }

/// Some of a plan's launches: [begin, end).
struct Range {
    size_t begin, end;
};

void encode(const Work& work, Range range, const Operands& operands, const Leases& scratch,
            const std::vector<id<MTLBuffer>>& uploaded, id<MTLCommandBuffer> commands,
            std::string_view caller) {
    const Encoder owner(commands, caller);
    id<MTLComputeCommandEncoder> encoder = owner.get();
    for (size_t i = range.begin; i < range.end; ++i) {
        const KernelLaunch& launch = work.plan.launches[i];
        // Launches see what those before them wrote, whatever kind of encoder this is.
        if (i > range.begin && !launch.further_slice)
            [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
        [encoder setComputePipelineState:work.pipelines[i].state];
        for (const Binding& binding : launch.buffers) {
            Operands::Bound bound;
            if (binding.kind == Binding::Kind::data) {
                const std::vector<std::byte>& data = work.plan.data[binding.piece];
                if (!uploaded[binding.piece]) {
                    [encoder setBytes:data.data() length:data.size() atIndex:binding.index];
                    continue;
                }
                bound = {uploaded[binding.piece], binding.byte_offset};
            } else if (binding.kind == Binding::Kind::scratch) {
                bound = {scratch[binding.piece].buffer(), binding.byte_offset};
            } else {
                bound = operands.bound(binding);
            }
            [encoder setBuffer:bound.buffer offset:bound.offset atIndex:binding.index];
        }
        [encoder setBytes:launch.params.data()
                   length:launch.params.size()
                  atIndex:launch.params_index];
        [encoder dispatchThreadgroups:metal_size(launch.grid)
                threadsPerThreadgroup:metal_size(launch.threadgroup)];
    }
}

/// "(64, 3, 0)"
std::string text_of(const Size3& size) {
    return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
           std::to_string(size.z) + ")";
}

/// Which part of a call did not succeed; empty if it is all of it.
std::string place_text(const Work& work, Range range) {
    if (range.end - range.begin == work.plan.launches.size()) return {};
    std::string text = " in its slices";
    for (size_t i = range.begin; i < range.end; ++i) {
        const KernelLaunch& launch = work.plan.launches[i];
        const Size3 end{launch.origin.x + launch.grid.x, launch.origin.y + launch.grid.y,
                        launch.origin.z + launch.grid.z};
        if (i < range.begin + 3 || i == range.end - 1)
            text += " " + std::to_string(i + 1) + " (" + launch.kernel + ", threadgroups " +
                    text_of(launch.origin) + " to " + text_of(end) + ")";
    }
    return text + " of " + std::to_string(work.plan.launches.size());
}

/// The command buffers of a call that the GPU has not finished: two, so that it always has work.
class Running {
public:
    Running(Context& context, id<MTLCommandQueue> queue, const Work& work, std::string_view caller)
        : context_(context), queue_(queue), work_(work), caller_(caller) {}
    /// Also after an error nothing may run that uses the tensors.
    ~Running() {
        for (const Commands& commands : running_) [commands.buffer waitUntilCompleted];
    }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;

    void commit(id<MTLCommandBuffer> buffer, Range range) {
        if (running_.size() == 2) wait();
        [buffer commit];
        ++stats().command_buffers;
        running_.push_back({buffer, range});
    }
    /// Until all are finished. Throws `Error` if one fails.
    void finish() {
        while (!running_.empty()) wait();
    }

private:
    struct Commands {
        id<MTLCommandBuffer> buffer;
        Range range;
    };

    void wait() {
        const Commands first = running_.front();
        running_.erase(running_.begin());
        [first.buffer waitUntilCompleted];
        if (first.buffer.status != MTLCommandBufferStatusCompleted) {
            context_.replace_queue(queue_);
            fail_command_buffer(caller_, first.buffer.error, place_text(work_, first.range));
        }
        stats().gpu_nanoseconds +=
            static_cast<uint64_t>((first.buffer.GPUEndTime - first.buffer.GPUStartTime) * 1e9);
    }

    Context& context_;
    id<MTLCommandQueue> queue_;
    const Work& work_;
    const std::string_view caller_;
    std::vector<Commands> running_;
};

}  // namespace

void run(Context& context, std::string_view caller, const Planner& plan) {
    const AutoreleasePool pool;
    const Work work = prepare(context, caller, plan);
    if (work.plan.launches.empty()) return;
    const Operands operands(work.plan, caller, context.gpu(), Operands::Copies::allowed);
    const Leases scratch = take_scratch(context, work, caller);

    const std::vector<id<MTLBuffer>> uploaded = upload(context, work, caller);

    id<MTLCommandQueue> queue = context.queue(caller);
    Running running(context, queue, work, caller);
    for (size_t begin = 0; begin < work.plan.launches.size();) {
        const AutoreleasePool of_buffer;
        const Range range{begin, begin + launches_together(work.plan, begin)};
        // Waits while 64 of the queue's are unfinished: for as many threads, since each sees its own
        // end.
        id<MTLCommandBuffer> commands = [queue commandBuffer];
        if (!commands)
            fail(ErrorKind::device, caller, "Metal made no command buffer", "nil",
                 "a queue that takes work");
        encode(work, range, operands, scratch, uploaded, commands, caller);
        running.commit(commands, range);
        begin = range.end;
    }
    running.finish();
    operands.copy_back();
}

void forward(const Problem& problem, const ForwardResults& results) {
    run(*Context::current(problem.function), problem.function,
        [&](const Capabilities& gpu) { return plan_forward(problem, results, gpu); });
}

void backward(const BackwardProblem& problem, const BackwardResults& results) {
    const std::string_view caller = problem.forward.function;
    run(*Context::current(caller), caller,
        [&](const Capabilities& gpu) { return plan_backward(problem, results, gpu); });
}

namespace {

/// As prepare() does, a plan whose threadgroups the player's kernels do not take is made again.
bool play(std::string_view caller, Player& player, const Planner& plan) {
    const AutoreleasePool pool;
    Capabilities gpu = Context::current(caller)->capabilities();
    for (;;) {
        const LaunchPlan planned = plan(gpu);
        if (planned.launches.empty()) return true;
        const Played played = player.play(planned);
        if (played.done || played.max_threads == 0) return played.done;
        if (played.max_threads >= gpu.max_threads)
            fail(ErrorKind::unsupported, caller, "no kernel has a tile small enough for this GPU",
                 std::to_string(gpu.max_threads) + " threads",
                 "at most " + std::to_string(played.max_threads));
        gpu.max_threads = played.max_threads;
    }
}

}  // namespace

bool play_forward(const Problem& problem, const ForwardResults& results, Player& player) {
    return play(problem.function, player,
                [&](const Capabilities& gpu) { return plan_forward(problem, results, gpu); });
}

bool play_backward(const BackwardProblem& problem, const BackwardResults& results, Player& player) {
    return play(problem.forward.function, player,
                [&](const Capabilities& gpu) { return plan_backward(problem, results, gpu); });
}

bool play_combine(const CombineProblem& problem, const CombineResults& results, Player& player) {
    return play(problem.function, player,
                [&](const Capabilities& gpu) { return plan_combine(problem, results, gpu); });
}

void combine(const CombineProblem& problem, const CombineResults& results) {
    run(*Context::current(problem.function), problem.function,
        [&](const Capabilities& gpu) { return plan_combine(problem, results, gpu); });
}

bool play_quantize(const QuantizeProblem& problem, const QuantizeResults& results, Player& player) {
    if (!problem.allow_nonfinite)
        fail(ErrorKind::internal, problem.function, "a stream was given a call that waits",
             "nonfinite='raise'", "nonfinite='nan'");
    return play(problem.function, player, [&](const Capabilities& gpu) {
        return plan_quantize(problem, results, nullptr, gpu);
    });
}

bool play_dequantize(const DequantizeProblem& problem, const DequantizeResults& results,
                     Player& player) {
    return play(problem.function, player,
                [&](const Capabilities& gpu) { return plan_dequantize(problem, results, gpu); });
}

void quantize(const QuantizeProblem& problem, const QuantizeResults& results) {
    std::vector<uint8_t> faults(
        problem.allow_nonfinite ? 0 : static_cast<size_t>(problem.sizes.block_count()));
    const TensorView view = faults_view(problem, faults.data());
    run(*Context::current(problem.function), problem.function, [&](const Capabilities& gpu) {
        return plan_quantize(problem, results, faults.empty() ? nullptr : &view, gpu);
    });
    for (size_t block = 0; block < faults.size(); ++block)
        if (faults[block] != 0)
            problem.refuse(static_cast<int64_t>(block), faults[block] == UMFA_FAULT_TOO_LARGE);
}

void dequantize(const DequantizeProblem& problem, const DequantizeResults& results) {
    run(*Context::current(problem.function), problem.function,
        [&](const Capabilities& gpu) { return plan_dequantize(problem, results, gpu); });
}

Kernels prepare_forward(const Problem& problem, const ForwardResults& results) {
    return prepare_kernels(problem.function, [&](const Capabilities& gpu) {
        return plan_forward(problem, results, gpu);
    });
}

Kernels prepare_combine(const CombineProblem& problem, const CombineResults& results) {
    return prepare_kernels(problem.function, [&](const Capabilities& gpu) {
        return plan_combine(problem, results, gpu);
    });
}

void encode_forward(const Problem& problem, const ForwardResults& results, void* command_buffer) {
    const AutoreleasePool pool;
    const std::shared_ptr<Context> context = Context::current(problem.function);
    id<MTLCommandBuffer> commands = (__bridge id<MTLCommandBuffer>)command_buffer;
    if (![commands.device isEqual:context->gpu().device])
        fail(ErrorKind::value, problem.function, "the command buffer is of another Metal device",
             text_of(commands.device.name), context->gpu().name);
    if (commands.status != MTLCommandBufferStatusNotEnqueued &&
        commands.status != MTLCommandBufferStatusEnqueued)
        fail(ErrorKind::value, problem.function, "the command buffer is already committed",
             "status " + std::to_string(commands.status), "one that takes more work");
    const Work work = prepare(*context, problem.function, [&](const Capabilities& gpu) {
        return plan_forward(problem, results, gpu);
    });
    if (work.plan.launches.empty()) return;
    const Operands operands(work.plan, problem.function, context->gpu(), Operands::Copies::refused);
    // The command buffer retains the buffers it uses; scratch must not reach another call before.
    const auto scratch = std::make_shared<Leases>(take_scratch(*context, work, problem.function));
    encode(work, {0, work.plan.launches.size()}, operands, *scratch,
           upload(*context, work, problem.function), commands, problem.function);
    if (!scratch->empty())
        [commands addCompletedHandler:^(id<MTLCommandBuffer>) {
          scratch->clear();
        }];
}

}  // namespace umfa::metal
