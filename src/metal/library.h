// Where kernels come from: the metallib in umfa, or its Metal text.
#pragma once

#import <Metal/Metal.h>

#include <string_view>

#include "core/launch_plan.h"
#include "metal/build_once.h"
#include "metal/device.h"

namespace umfa::metal {

class Libraries {
public:
    struct Function {
        id<MTLFunction> function = nil;
        bool from_text = false;
    };
    /// The kernel of a launch, with its constants. Throws `Error`.
    Function function_of(const Gpu& gpu, const KernelLaunch& launch, std::string_view caller);

private:
    BuildOnce<id<MTLLibrary>> libraries_;
};

}  // namespace umfa::metal
