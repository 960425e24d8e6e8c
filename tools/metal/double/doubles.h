// What the files of the double share.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "runtime/double.h"

@interface NSNumber (UMFADouble)
+ (NSNumber*)umfaWith:(long long)value __attribute__((ns_returns_retained));
@end

@interface NSArray (UMFADouble)
- (void)umfaAdd:(id)object;
@end

@interface NSMutableDictionary (UMFADouble)
- (void)umfaCopyInto:(std::vector<std::pair<std::string, std::string>>*)entries;
@end

@interface NSError (UMFADouble)
+ (NSError*)umfaErrorWithDomain:(NSString*)domain code:(NSInteger)code text:(const char*)text;
@end

@interface OS_dispatch_data (UMFADouble)
- (void)umfaAssign:(const void*)bytes length:(size_t)length;
- (const char*)umfaText;
@end

namespace metal_double {

/// One GPU of the machine.
struct DeviceFacts {
    std::string name, architecture;
    int family = 7;
    bool unified = true;
    uint64_t id = 0;     // what Metal says
    std::string driver;  // the class of its driver in the I/O registry; empty: it has none
    uint64_t driver_id = 0;
    int cores_kind = UMFA_CORES_ABSENT;
    int64_t cores = 0;
};

struct Machine {
    std::vector<DeviceFacts> devices;
    int listed = 0;  // how many of them MTLCopyAllDevices has, from the first
    int usual = -1;  // the one that MTLCreateSystemDefaultDevice returns; -1: nil
    int max_threads = 1024;
    uint32_t shuffle = 0;
};
Machine machine();

/// The GPU of a number, retained; nil where the machine has none of it.
id<MTLDevice> new_device(int number);

/// Whether the next operation of a kind is to fail, and with which value.
bool fault(umfa_double_fault_kind kind, int64_t* value = nullptr);

/// Counts what the compiler did.
void count(umfa_double_count_kind kind);

/// What Metal's validation layer would have stopped at.
void violation(const std::string& text);

/// One thing a pipeline computes: library text, kernel and constants.
struct Kernel {
    std::string source, name;
    struct Constant {
        uint32_t type;
        int32_t value;
    };
    std::map<uint32_t, Constant> constants;
};

struct Binding {
    id<MTLBuffer> buffer = nil;  // retained by the command buffer; nil for bytes
    std::vector<char> bytes;
    NSUInteger offset = 0;
};

struct Dispatch {
    Kernel kernel;
    std::map<uint32_t, Binding> bindings;
    MTLSize groups, threads;
};

/// Calls what the test has registered. False: failed, with the reason in `error`.
bool prepare(const Kernel& kernel, uint64_t& static_bytes, std::string& error);
bool run(Dispatch& dispatch, std::string& error);

}  // namespace metal_double

@interface UMFAFunction : NSObject <MTLFunction> {
@public
    metal_double::Kernel kernel;
}
@end

@interface UMFAPipeline : NSObject <MTLComputePipelineState> {
@public
    metal_double::Kernel kernel;
    NSUInteger max_threads, static_bytes;
}
@end

@interface UMFABuffer : NSObject <MTLBuffer>
+ (UMFABuffer*)newOn:(id<MTLDevice>)device length:(NSUInteger)length;
+ (UMFABuffer*)newOn:(id<MTLDevice>)device
            wrapping:(void*)pointer
              length:(NSUInteger)length
         deallocator:(void (^)(void*, NSUInteger))deallocator;
@end

@interface UMFAQueue : NSObject <MTLCommandQueue>
+ (UMFAQueue*)newOn:(id<MTLDevice>)device;
@end

@interface MTLArchitecture (UMFADouble)
+ (MTLArchitecture*)umfaNamed:(const char*)name;
@end

@interface MTLCompileOptions (UMFADouble)
/// Whether safe mode and precise functions have been asked for.
- (BOOL)umfaMathIsSafe;
@end
