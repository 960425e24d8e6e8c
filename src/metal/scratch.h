// Device memory between the launches of a plan: taken for a call, given back, used again.
#pragma once

#import <Metal/Metal.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

namespace umfa::metal {

class ScratchPool {
    struct Free {
        std::mutex lock;
        std::vector<id<MTLBuffer>> buffers;
        uint64_t bytes = 0;
    };

public:
    /// A buffer that goes back to the pool when the lease ends, also after the pool has.
    class Lease {
    public:
        Lease(std::weak_ptr<Free> home, id<MTLBuffer> buffer)
            : home_(std::move(home)), buffer_(buffer) {}
        Lease(Lease&& other) noexcept : home_(std::move(other.home_)), buffer_(other.buffer_) {
            other.buffer_ = nil;
        }
        Lease& operator=(Lease&&) = delete;
        ~Lease();
        id<MTLBuffer> buffer() const { return buffer_; }

    private:
        std::weak_ptr<Free> home_;
        id<MTLBuffer> buffer_;
    };

    /// At least `bytes`, of any content. Throws `Error` when there is no memory.
    Lease take(id<MTLDevice> device, uint64_t bytes, std::string_view caller);

private:
    std::shared_ptr<Free> free_ = std::make_shared<Free>();
};

}  // namespace umfa::metal
