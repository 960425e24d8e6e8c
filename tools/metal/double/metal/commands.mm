// Double of buffers, command queues, command buffers and encoders.
//
// A queue is a thread that runs what was committed to it, in that order. Once a command buffer of
// its has failed, the queue is poisoned, as on Apple's GPUs: what follows is ignored with an error.
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>

#include "../doubles.h"

using namespace metal_double;

// ---- buffers -------------------------------------------------------------------------------------

@implementation UMFABuffer {
    id<MTLDevice> _device;
    void* _contents;
    NSUInteger _length;
    bool _owned;
    void (^_deallocator)(void*, NSUInteger);
}
+ (UMFABuffer*)newOn:(id<MTLDevice>)device length:(NSUInteger)length {
    UMFABuffer* buffer = [UMFABuffer new];
    const auto page = static_cast<size_t>(getpagesize());
    buffer->_device = [device retain];
    buffer->_contents = std::aligned_alloc(page, (length + page - 1) / page * page);
    buffer->_length = length;
    buffer->_owned = true;
    // Memory of a pool, or of another process before: never zero when it matters.
    std::memset(buffer->_contents, 0xa5, length);
    return buffer;
}
+ (UMFABuffer*)newOn:(id<MTLDevice>)device
            wrapping:(void*)pointer
              length:(NSUInteger)length
         deallocator:(void (^)(void*, NSUInteger))deallocator {
    UMFABuffer* buffer = [UMFABuffer new];
    buffer->_device = [device retain];
    buffer->_contents = pointer;
    buffer->_length = length;
    buffer->_deallocator = (void (^)(void*, NSUInteger))[(id)deallocator retain];
    return buffer;
}
- (void)dealloc {
    if (_owned) std::free(_contents);
    if (_deallocator) _deallocator(_contents, _length);
    [(id)_deallocator release];
    [_device release];
    [super dealloc];
}
- (id<MTLDevice>)device {
    return _device;
}
- (NSUInteger)length {
    return _length;
}
- (void*)contents {
    return _contents;
}
@end

// ---- command buffers -----------------------------------------------------------------------------

namespace {

/// Dispatches between two barriers of a concurrent encoder, which may run in any order.
using Phase = std::vector<Dispatch>;

struct Worker;

}  // namespace

@interface UMFACommandBuffer : NSObject <MTLCommandBuffer> {
@public
    UMFAQueue* queue;
    std::vector<Phase> phases;
    std::vector<id> kept;
    bool encoding;
    std::vector<MTLCommandBufferHandler> handlers;
    std::mutex lock;
    std::condition_variable changed;
    MTLCommandBufferStatus state;
    NSError* failure;
    bool done;  // handlers included
    double start, end;
}
/// On the queue's thread. False: poisons the queue.
- (bool)executePoisoned:(bool)poisoned;
@end

@interface UMFAQueue () {
@public
    id<MTLDevice> _device;
    std::shared_ptr<Worker> _worker;
}
@end

namespace {

struct Worker {
    std::mutex lock;
    std::condition_variable wake;
    std::deque<UMFACommandBuffer*> committed;  // retained
    bool stop = false;
    std::thread thread;

    void loop() {
        bool poisoned = false;
        std::unique_lock guard(lock);
        for (;;) {
            wake.wait(guard, [this] { return stop || !committed.empty(); });
            if (committed.empty()) return;
            UMFACommandBuffer* buffer = committed.front();
            committed.pop_front();
            guard.unlock();
            @autoreleasepool {
                poisoned = ![buffer executePoisoned:poisoned] || poisoned;
                [buffer release];  // may be the last use of the queue, and of this worker
            }
            guard.lock();
        }
    }
};

double now() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

@interface UMFAEncoder : NSObject <MTLComputeCommandEncoder> {
@public
    UMFACommandBuffer* command_buffer;
    UMFAPipeline* pipeline;
    std::map<uint32_t, Binding> bindings;
    bool concurrent, fresh, ended;
}
@end

@implementation UMFAEncoder
- (void)dealloc {
    if (!ended) violation("a command encoder is released without endEncoding");
    [pipeline release];
    [command_buffer release];
    [super dealloc];
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
    if (!state) violation("setComputePipelineState: nil");
    [state retain];
    [pipeline release];
    pipeline = (UMFAPipeline*)state;
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
    if (index > 30) violation("setBuffer: index above 30");
    if (!buffer) {
        violation("setBuffer: nil");
        return;
    }
    if (offset >= buffer.length) violation("setBuffer: the offset is outside the buffer");
    command_buffer->kept.push_back([buffer retain]);
    Binding binding;
    binding.buffer = buffer;
    binding.offset = offset;
    bindings[static_cast<uint32_t>(index)] = std::move(binding);
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
    if (index > 30) violation("setBytes: index above 30");
    if (length == 0 || length >= 4096) violation("setBytes: not 1 to 4095 bytes");
    Binding binding;
    binding.bytes.assign((const char*)bytes, (const char*)bytes + length);
    bindings[static_cast<uint32_t>(index)] = std::move(binding);
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
    if (scope != MTLBarrierScopeBuffers) violation("memoryBarrierWithScope: not buffers");
    fresh = true;
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
    if (ended) violation("dispatchThreadgroups: after endEncoding");
    if (!pipeline) {
        violation("dispatchThreadgroups: no pipeline");
        return;
    }
    if (groups.width * groups.height * groups.depth == 0)
        violation("dispatchThreadgroups: an empty grid");
    const NSUInteger count = threads.width * threads.height * threads.depth;
    if (count == 0 || count > 1024 || count > pipeline->max_threads)
        violation("dispatchThreadgroups: more threads than the pipeline takes");
    if (count % 32 != 0) violation("dispatchThreadgroups: a partial simdgroup");
    if (pipeline->static_bytes > 32768)
        violation("dispatchThreadgroups: more than 32 KiB of threadgroup memory");
    auto& phases = command_buffer->phases;
    if (phases.empty() || fresh || !concurrent) phases.emplace_back();
    fresh = false;
    phases.back().push_back({pipeline->kernel, bindings, groups, threads});
}
- (void)endEncoding {
    if (ended) violation("endEncoding: twice");
    ended = true;
    const std::lock_guard guard(command_buffer->lock);
    command_buffer->encoding = false;
}
@end

@implementation UMFACommandBuffer
- (void)dealloc {
    if (encoding) violation("a command buffer is released while an encoder is open");
    for (MTLCommandBufferHandler handler : handlers) [(id)handler release];
    for (id object : kept) [object release];
    [failure release];
    [queue release];
    [super dealloc];
}
- (id<MTLDevice>)device {
    return queue->_device;
}
- (MTLCommandBufferStatus)status {
    const std::lock_guard guard(lock);
    return state;
}
- (NSError*)error {
    const std::lock_guard guard(lock);
    return [[failure retain] autorelease];
}
- (CFTimeInterval)GPUStartTime {
    const std::lock_guard guard(lock);
    if (state < MTLCommandBufferStatusCompleted)
        violation("GPUStartTime: before the command buffer has completed");
    return start;
}
- (CFTimeInterval)GPUEndTime {
    const std::lock_guard guard(lock);
    return end;
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoderWithDispatchType:(MTLDispatchType)type {
    if (fault(UMFA_FAULT_ENCODER)) return nil;
    const std::lock_guard guard(lock);
    if (encoding) violation("computeCommandEncoder: another encoder is already encoding");
    if (state != MTLCommandBufferStatusNotEnqueued)
        violation("computeCommandEncoder: the command buffer is committed");
    encoding = true;
    UMFAEncoder* encoder = [UMFAEncoder new];
    encoder->command_buffer = [self retain];
    encoder->concurrent = type == MTLDispatchTypeConcurrent;
    encoder->fresh = true;  // what other encoders wrote is visible
    return [encoder autorelease];
}
- (void)addCompletedHandler:(MTLCommandBufferHandler)block {
    const std::lock_guard guard(lock);
    if (state != MTLCommandBufferStatusNotEnqueued)
        violation("addCompletedHandler: the command buffer is committed");
    handlers.push_back((MTLCommandBufferHandler)[(id)block retain]);
}
- (void)commit {
    {
        const std::lock_guard guard(lock);
        if (encoding) violation("commit: an encoder is still open");
        if (state != MTLCommandBufferStatusNotEnqueued) {
            violation("commit: twice");
            return;
        }
        state = MTLCommandBufferStatusCommitted;
    }
    [self retain];
    Worker& worker = *queue->_worker;
    const std::lock_guard guard(worker.lock);
    worker.committed.push_back(self);
    worker.wake.notify_one();
}
- (void)waitUntilCompleted {
    std::unique_lock guard(lock);
    if (state == MTLCommandBufferStatusNotEnqueued) {
        violation("waitUntilCompleted: the command buffer is not committed");
        return;
    }
    changed.wait(guard, [self] { return done; });
}
- (bool)executePoisoned:(bool)poisoned {
    std::string reason;
    int64_t code = 0;
    const double begin = now();
    bool ok = true;
    if (poisoned) {
        reason = "Ignored (for causing prior/excessive GPU errors)";
        code = MTLCommandBufferErrorAccessRevoked;
        ok = false;
    } else if (fault(UMFA_FAULT_EXECUTION, &code)) {
        reason = code == MTLCommandBufferErrorTimeout       ? "Caused GPU Timeout Error"
                 : code == MTLCommandBufferErrorOutOfMemory ? "Insufficient Memory"
                                                            : "Caused GPU Address Fault Error";
        ok = false;
    }
    std::mt19937 random(machine().shuffle);
    for (Phase& phase : phases) {
        // Where the encoder promises no order, the last comes first.
        std::reverse(phase.begin(), phase.end());
        if (machine().shuffle != 0) std::shuffle(phase.begin(), phase.end(), random);
        for (Dispatch& dispatch : phase) {
            if (!ok) break;
            ok = run(dispatch, reason);
            code = MTLCommandBufferErrorPageFault;
        }
    }
    std::vector<MTLCommandBufferHandler> waiting;
    {
        const std::lock_guard guard(lock);
        state = ok ? MTLCommandBufferStatusCompleted : MTLCommandBufferStatusError;
        if (!ok)
            failure = [[NSError umfaErrorWithDomain:@"MTLCommandBufferErrorDomain"
                                               code:code
                                               text:reason.c_str()] retain];
        start = begin;
        end = now();
        waiting.swap(handlers);
    }
    for (MTLCommandBufferHandler handler : waiting) {
        handler(self);
        [(id)handler release];
    }
    {
        const std::lock_guard guard(lock);
        done = true;
        changed.notify_all();
    }
    return ok;
}
@end

// ---- queues --------------------------------------------------------------------------------------

@implementation UMFAQueue
+ (UMFAQueue*)newOn:(id<MTLDevice>)device {
    UMFAQueue* queue = [UMFAQueue new];
    queue->_device = [device retain];
    queue->_worker = std::make_shared<Worker>();
    queue->_worker->thread = std::thread([worker = queue->_worker] { worker->loop(); });
    return queue;
}
- (void)dealloc {
    // Nothing is left to run: what is committed retains its command buffer, and that the queue.
    Worker& worker = *_worker;
    {
        const std::lock_guard guard(worker.lock);
        worker.stop = true;
        worker.wake.notify_one();
    }
    if (worker.thread.get_id() == std::this_thread::get_id())
        worker.thread.detach();
    else
        worker.thread.join();
    [_device release];
    [super dealloc];
}
- (id<MTLCommandBuffer>)commandBuffer {
    if (fault(UMFA_FAULT_COMMAND_BUFFER)) return nil;
    UMFACommandBuffer* buffer = [UMFACommandBuffer new];
    buffer->queue = [self retain];
    return [buffer autorelease];
}
@end

// ---- for tests, which are other users of the GPU ---------------------------------------------------

extern "C" {

void* umfa_double_new_buffer(uint64_t length) { return umfa_double_new_buffer_on(0, length); }

void* umfa_double_new_buffer_on(int32_t number, uint64_t length) {
    id<MTLDevice> device = new_device(number);
    // The test's own memory: faults are for umfa, rules for everyone.
    void* buffer = length > 0
                       ? (void*)[UMFABuffer newOn:device length:length]
                       : [device newBufferWithLength:length options:MTLResourceStorageModeShared];
    [device release];
    return buffer;
}

void* umfa_double_buffer_contents(void* buffer) { return ((id<MTLBuffer>)buffer).contents; }

void* umfa_double_new_queue(void) { return umfa_double_new_queue_on(0); }

void* umfa_double_new_queue_on(int32_t number) {
    id<MTLDevice> device = new_device(number);
    void* queue = [device newCommandQueue];
    [device release];
    return queue;
}

void* umfa_double_new_command_buffer(void* queue) {
    @autoreleasepool {
        return [[(id<MTLCommandQueue>)queue commandBuffer] retain];
    }
}

void umfa_double_commit(void* command_buffer) { [(id<MTLCommandBuffer>)command_buffer commit]; }

int32_t umfa_double_wait(void* command_buffer) {
    [(id<MTLCommandBuffer>)command_buffer waitUntilCompleted];
    return umfa_double_status(command_buffer);
}

int32_t umfa_double_status(void* command_buffer) {
    return static_cast<int32_t>(((id<MTLCommandBuffer>)command_buffer).status);
}

void umfa_double_object_release(void* object) { [(id)object release]; }
}
