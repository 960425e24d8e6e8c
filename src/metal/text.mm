#import "metal/text.h"

namespace umfa::metal {

void fail_command_buffer(std::string_view function, NSError* error, const std::string& where) {
    const std::string got = text_of(error);
    switch (static_cast<MTLCommandBufferError>(error ? error.code : 0)) {
        case MTLCommandBufferErrorOutOfMemory:
            fail(ErrorKind::memory, function, "the GPU ran out of memory" + where, got,
                 "a smaller problem, or fewer programs that use the GPU");
        case MTLCommandBufferErrorTimeout:
            fail(ErrorKind::device, function, "the GPU did not finish in time" + where, got,
                 "a smaller problem, so that the system's watchdog lets it end");
        case MTLCommandBufferErrorPageFault:
            fail(ErrorKind::device, function, "the GPU accessed memory that it may not" + where,
                 got, "tensors that live until the call returns; else report this as a bug");
        case MTLCommandBufferErrorAccessRevoked:
            fail(ErrorKind::device, function, "the system refused the work" + where, got,
                 "no earlier error on the GPU");
    }
    fail(ErrorKind::device, function, "the GPU failed" + where, got,
         "a command buffer that completes");
}

}  // namespace umfa::metal
