#import "metal/library.h"

#include <dispatch/dispatch.h>

#include "core/instruments.h"
#include "metal/kernel_text.h"
#import "metal/text.h"

namespace umfa::metal {
namespace {

/// The metallib, or nil and why not.
id<MTLLibrary> open_metallib(const Gpu& gpu, std::string& reason) {
    const std::string_view bytes = metallib();
    dispatch_data_t data =
        dispatch_data_create(bytes.data(), bytes.size(), nullptr, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
    NSError* error = nil;
    id<MTLLibrary> library = [gpu.device newLibraryWithData:data error:&error];
    if (!library) reason = text_of(error);
    return library;
}

/// Apple's defaults depend on the system, so every choice is made. Safe mathematics: kernels meet
/// NaN and infinities in what they are given. Where speed allows less, they say fast:: themselves.
/// The same as -fno-fast-math, with which the metallib is compiled: safe mode, precise functions.
MTLCompileOptions* compile_options() {
    MTLCompileOptions* options = [MTLCompileOptions new];
    options.languageVersion = MTLLanguageVersion3_1;
#if __MAC_OS_X_VERSION_MAX_ALLOWED >= 150000
    if (@available(macOS 15.0, *)) {
        options.mathMode = MTLMathModeSafe;
        options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
        return options;
    }
#endif
    options.fastMathEnabled = NO;
    return options;
}

id<MTLLibrary> compile(const Gpu& gpu, const KernelLaunch& launch, std::string_view caller) {
    const std::string text = kernel_text(launch);
    if (text.empty())
        fail(ErrorKind::internal, caller, "a shader is missing from umfa", launch.source,
             "a file that the build has embedded");
    NSError* error = nil;
    id<MTLLibrary> library = [gpu.device newLibraryWithSource:ns_string(text)
                                                      options:compile_options()
                                                        error:&error];
    // An error beside a library holds warnings.
    if (!library)
        fail(ErrorKind::device, caller, "Metal's compiler refused the kernel " + launch.kernel,
             text_of(error), "a macOS whose Metal is 3.1 or newer; else report this as a bug");
    return library;
}

MTLFunctionConstantValues* constants_of(const KernelLaunch& launch) {
    MTLFunctionConstantValues* values = [MTLFunctionConstantValues new];
    for (const Constant& constant : launch.constants) {
        if (constant.type == Constant::Type::boolean) {
            const bool flag = constant.value != 0;
            [values setConstantValue:&flag type:MTLDataTypeBool atIndex:constant.index];
        } else {
            [values setConstantValue:&constant.value type:MTLDataTypeInt atIndex:constant.index];
        }
    }
    return values;
}

}  // namespace

Libraries::Function Libraries::function_of(const Gpu& gpu, const KernelLaunch& launch,
                                           std::string_view caller) {
    NSString* name = ns_string(launch.kernel);
    MTLFunctionConstantValues* constants = constants_of(launch);
    NSError* error = nil;
    std::string reason;
    if (!metallib().empty()) {
        id<MTLLibrary> ahead =
            libraries_.get("metallib", [&] { return open_metallib(gpu, reason); });
        if (ahead) {
            id<MTLFunction> function = [ahead newFunctionWithName:name
                                                   constantValues:constants
                                                            error:&error];
            if (function) return {function, false};
            reason = text_of(error);
        }
        // A shape that was not compiled ahead, or a system that is older than the compiler.
        reason = "in the metallib: " + reason + "; in the text: ";
    }
    id<MTLLibrary> library = libraries_.get(launch.kernel + "\n" + kernel_defines(launch),
                                            [&] { return compile(gpu, launch, caller); });
    id<MTLFunction> function = [library newFunctionWithName:name
                                             constantValues:constants
                                                      error:&error];
    if (!function)
        fail(ErrorKind::device, caller, "Metal has no kernel " + launch.kernel,
             reason + text_of(error), "the kernel that umfa's planner names; report this as a bug");
    return {function, true};
}

}  // namespace umfa::metal
