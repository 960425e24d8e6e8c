#import "metal/scratch.h"

#include <algorithm>

#include "core/error.h"
#import "metal/autorelease.h"

namespace umfa::metal {
namespace {

constexpr uint64_t granule = 64 * 1024;
/// What the pool keeps at most between calls: enough for a model whose layers are all alike.
constexpr uint64_t kept_bytes = 256 * 1024 * 1024;

}  // namespace

ScratchPool::Lease::~Lease() {
    if (!buffer_) return;
    const AutoreleasePool pool;
    const std::shared_ptr<Free> home = home_.lock();
    if (!home) return;
    const std::lock_guard guard(home->lock);
    if (home->bytes + buffer_.length > kept_bytes) return;
    home->bytes += buffer_.length;
    home->buffers.push_back(buffer_);
}

ScratchPool::Lease ScratchPool::take(id<MTLDevice> device, uint64_t bytes,
                                     std::string_view caller) {
    const uint64_t wanted = std::max((bytes + granule - 1) / granule, uint64_t{1}) * granule;
    {
        const std::lock_guard guard(free_->lock);
        auto best = free_->buffers.end();
        for (auto at = free_->buffers.begin(); at != free_->buffers.end(); ++at)
            if ((*at).length >= wanted && (*at).length <= 2 * wanted &&
                (best == free_->buffers.end() || (*at).length < (*best).length))
                best = at;
        if (best != free_->buffers.end()) {
            id<MTLBuffer> buffer = *best;
            free_->bytes -= buffer.length;
            free_->buffers.erase(best);
            return {free_, buffer};
        }
    }
    id<MTLBuffer> buffer = [device newBufferWithLength:wanted
                                               options:MTLResourceStorageModePrivate];
    if (!buffer)
        fail(ErrorKind::memory, caller, "no memory for the GPU's intermediate results",
             std::to_string(wanted) + " bytes", "a smaller problem");
    return {free_, buffer};
}

}  // namespace umfa::metal
