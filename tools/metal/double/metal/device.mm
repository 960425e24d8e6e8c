// Double of MTLDevice, and of what it compiles: libraries, functions, pipelines.
#include "../doubles.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <set>

using namespace metal_double;

namespace {

void set_error(NSError** error, NSString* domain, NSInteger code, const char* text) {
    if (error) *error = [NSError umfaErrorWithDomain:domain code:code text:text];
}

}  // namespace

@implementation MTLArchitecture {
    NSString* _name;
}
+ (MTLArchitecture*)umfaNamed:(const char*)name {
    MTLArchitecture* architecture = [MTLArchitecture new];
    architecture->_name = [[NSString stringWithUTF8String:name] retain];
    return [architecture autorelease];
}
- (void)dealloc {
    [_name release];
    [super dealloc];
}
- (NSString*)name {
    return [[_name retain] autorelease];
}
@end

@implementation MTLCompileOptions {
    BOOL _mode_is_safe, _functions_are_precise;
}
@synthesize languageVersion = _languageVersion, mathMode = _mathMode,
            mathFloatingPointFunctions = _mathFloatingPointFunctions,
            fastMathEnabled = _fastMathEnabled, preprocessorMacros = _preprocessorMacros;
- (void)setMathMode:(MTLMathMode)mode {
    _mathMode = mode;
    _mode_is_safe = mode == MTLMathModeSafe;
}
- (void)setMathFloatingPointFunctions:(MTLMathFloatingPointFunctions)functions {
    _mathFloatingPointFunctions = functions;
    _functions_are_precise = functions == MTLMathFloatingPointFunctionsPrecise;
}
- (void)setFastMathEnabled:(BOOL)enabled {
    _fastMathEnabled = enabled;
    _mode_is_safe = _functions_are_precise = !enabled;
}
- (BOOL)umfaMathIsSafe {
    return _mode_is_safe && _functions_are_precise;
}
- (void)dealloc {
    [_preprocessorMacros release];
    [super dealloc];
}
@end

@implementation MTLFunctionConstantValues {
@public
    std::map<uint32_t, Kernel::Constant> _values;
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
    Kernel::Constant constant{static_cast<uint32_t>(type), 0};
    if (type == MTLDataTypeBool)
        constant.value = *(const uint8_t*)value;
    else if (type == MTLDataTypeInt)
        constant.value = *(const int32_t*)value;
    else
        violation("setConstantValue: a data type that the double does not know");
    if (index > 65535) violation("setConstantValue: index above 65535");
    _values[static_cast<uint32_t>(index)] = constant;
}
@end

@implementation MTLComputePipelineDescriptor
@synthesize label = _label, computeFunction = _computeFunction,
            threadGroupSizeIsMultipleOfThreadExecutionWidth = _multiple,
            binaryArchives = _binaryArchives;
- (void)dealloc {
    [_label release];
    [_computeFunction release];
    [_binaryArchives release];
    [super dealloc];
}
@end

@implementation UMFAFunction
- (NSString*)name {
    return [NSString stringWithUTF8String:kernel.name.c_str()];
}
@end

@implementation UMFAPipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup {
    return max_threads;
}
- (NSUInteger)threadExecutionWidth {
    return 32;
}
- (NSUInteger)staticThreadgroupMemoryLength {
    return static_bytes;
}
@end

@interface UMFALibrary : NSObject <MTLLibrary> {
@public
    std::string source;
}
@end

namespace {

/// The value of a #define before the first line that is none; empty where there is no such.
std::string defined_in_front(const std::string& text, const std::string& name) {
    const std::string start = "#define " + name + " ";
    for (size_t at = 0, end; text.compare(at, 8, "#define ") == 0; at = end + 1) {
        end = text.find('\n', at);
        if (end == std::string::npos) break;
        if (text.compare(at, start.size(), start) == 0)
            return text.substr(at + start.size(), end - at - start.size());
    }
    return {};
}

/// Apple's compiler service takes its options as one string that it divides at spaces, and tools that
/// are known to work pass it no value with a quote or a comma either.
bool survives_the_service(const std::string& macro) {
    return macro.find_first_of(" \t\n\"'\\,") == std::string::npos;
}

}  // namespace

@implementation UMFALibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)values
                                 error:(NSError**)error {
    if (fault(UMFA_FAULT_FUNCTION)) {
        set_error(error, @"MTLLibraryErrorDomain", 5, "injected: no such function");
        return nil;
    }
    // A library made ahead holds what its text instantiates; one made from text for a kernel, that.
    const std::string quoted = std::string("\"") + name.UTF8String + "\"";
    const std::string only = defined_in_front(source, "UMFA_KERNEL");
    if (!only.empty() && only != quoted) {
        set_error(error, @"MTLLibraryErrorDomain", 5, "the library has no such function");
        return nil;
    }
    UMFAFunction* function = [UMFAFunction new];
    function->kernel.source = source;
    function->kernel.name = name.UTF8String;
    function->kernel.constants = values->_values;
    uint64_t ignored = 0;
    std::string reason;
    if (!prepare(function->kernel, ignored, reason)) {
        set_error(error, @"MTLLibraryErrorDomain", 5, reason.c_str());
        [function release];
        return nil;
    }
    return function;
}
@end

@implementation MTLBinaryArchiveDescriptor
@synthesize url = _url;
- (void)dealloc {
    [_url release];
    [super dealloc];
}
@end

@interface UMFAArchive : NSObject <MTLBinaryArchive> {
@public
    std::set<std::string> kernels;
}
@end

namespace {

constexpr const char* archive_start = "archive of the double";

/// One line that stands for a compiled kernel.
std::string line_of(const Kernel& kernel) {
    std::string all = kernel.name + " " + std::to_string(std::hash<std::string>{}(kernel.source));
    for (const auto& [index, constant] : kernel.constants)
        all += " " + std::to_string(index) + ":" + std::to_string(constant.value);
    return all;
}

}  // namespace

@implementation UMFAArchive
- (BOOL)addComputePipelineFunctionsWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                            error:(NSError**)error {
    if (fault(UMFA_FAULT_ARCHIVE_ADD)) {
        set_error(error, @"MTLBinaryArchiveDomain", 3, "injected: compilation failure");
        return NO;
    }
    count(UMFA_COUNT_COMPILED);
    kernels.insert(line_of(((UMFAFunction*)descriptor.computeFunction)->kernel));
    return YES;
}
- (BOOL)serializeToURL:(NSURL*)url error:(NSError**)error {
    std::ofstream stream(url.path.UTF8String);
    stream << archive_start << "\n";
    for (const std::string& kernel : kernels) stream << kernel << "\n";
    stream.close();
    if (stream && !fault(UMFA_FAULT_ARCHIVE_WRITE)) return YES;
    set_error(error, @"MTLBinaryArchiveDomain", 1, "the archive was not written");
    return NO;
}
@end

@interface UMFADevice : NSObject <MTLDevice> {
@public
    DeviceFacts facts;
    int number, max_threads;
}
@end

@implementation UMFADevice
- (NSString*)name {
    return [NSString stringWithUTF8String:facts.name.c_str()];
}
- (MTLArchitecture*)architecture {
    return [MTLArchitecture umfaNamed:facts.architecture.c_str()];
}
- (uint64_t)registryID {
    return facts.id;
}
// The same GPU, however often it is asked for.
- (BOOL)isEqual:(id)object {
    return [object isKindOfClass:[UMFADevice class]] && ((UMFADevice*)object)->number == number;
}
- (BOOL)hasUnifiedMemory {
    return facts.unified;
}
- (uint64_t)recommendedMaxWorkingSetSize {
    return uint64_t{6} << 30;
}
- (NSUInteger)maxBufferLength {
    return NSUInteger{4} << 30;
}
- (NSUInteger)maxThreadgroupMemoryLength {
    return 32768;
}
- (MTLSize)maxThreadsPerThreadgroup {
    return MTLSizeMake(1024, 1024, 1024);
}
- (BOOL)supportsFamily:(MTLGPUFamily)family {
    return family >= 1001 && family <= 1000 + facts.family;
}
- (id<MTLCommandQueue>)newCommandQueue {
    return fault(UMFA_FAULT_QUEUE) ? nil : [UMFAQueue newOn:self];
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
    if (length == 0) violation("newBufferWithLength: zero bytes");
    if (options != MTLResourceStorageModeShared && options != MTLResourceStorageModePrivate)
        violation("newBufferWithLength: options that the double does not know");
    if (length == 0 || length > self.maxBufferLength || fault(UMFA_FAULT_BUFFER)) return nil;
    return [UMFABuffer newOn:self length:length];
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void*, NSUInteger))deallocator {
    const auto page = static_cast<NSUInteger>(getpagesize());
    if (reinterpret_cast<uintptr_t>(pointer) % page != 0 || length % page != 0 || length == 0) {
        violation("newBufferWithBytesNoCopy: pointer or length is not a multiple of the page");
        return nil;
    }
    if (options != MTLResourceStorageModeShared)
        violation("newBufferWithBytesNoCopy: storage is not shared");
    if (length > self.maxBufferLength || fault(UMFA_FAULT_NO_COPY)) return nil;
    return [UMFABuffer newOn:self wrapping:pointer length:length deallocator:deallocator];
}
- (id<MTLLibrary>)newLibraryWithData:(dispatch_data_t)data error:(NSError**)error {
    if (fault(UMFA_FAULT_LIBRARY)) {
        set_error(error, @"MTLLibraryErrorDomain", 1, "injected: not a metallib");
        return nil;
    }
    // The double's metallib is the flattened text: its functions are compiled when they are asked
    // for.
    UMFALibrary* library = [UMFALibrary new];
    library->source = [data umfaText];
    return library;
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
    // What Apple's defaults are depends on the system: every choice must be made.
    if (options.languageVersion != MTLLanguageVersion3_1)
        violation("newLibraryWithSource: languageVersion is not 3.1");
    if (![options umfaMathIsSafe])
        violation("newLibraryWithSource: mathematics is not safe, or its functions not precise");
    if (fault(UMFA_FAULT_LIBRARY)) {
        set_error(error, @"MTLLibraryErrorDomain", 3,
                  "injected: program_source:1:1: error: expected unqualified-id");
        return nil;
    }
    std::vector<std::pair<std::string, std::string>> macros;
    [(NSMutableDictionary*)options.preprocessorMacros umfaCopyInto:&macros];
    std::string defines;
    for (const auto& [name, value] : macros) {
        if (!survives_the_service(name + "=" + value)) {
            const std::string text =
                "the compiler service takes no such macro: " + name + "=" + value;
            set_error(error, @"MTLLibraryErrorDomain", 3, text.c_str());
            return nil;
        }
        defines += "#define " + name + " " + value + "\n";
    }
    count(UMFA_COUNT_LIBRARIES);
    UMFALibrary* library = [UMFALibrary new];
    library->source = defines + source.UTF8String;
    return library;
}
- (id<MTLComputePipelineState>)
    newComputePipelineStateWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                  options:(MTLPipelineOption)options
                               reflection:(MTLComputePipelineReflection**)reflection
                                    error:(NSError**)error {
    if (!descriptor.computeFunction) violation("newComputePipelineState: no function");
    if ((options != MTLPipelineOptionNone && options != MTLPipelineOptionFailOnBinaryArchiveMiss) ||
        reflection)
        violation("newComputePipelineState: options that the double does not know");
    const std::string line = line_of(((UMFAFunction*)descriptor.computeFunction)->kernel);
    bool found = false;
    for (NSUInteger i = 0; i < descriptor.binaryArchives.count; ++i)
        found =
            found ||
            ((UMFAArchive*)[descriptor.binaryArchives objectAtIndex:i])->kernels.count(line) > 0;
    if (!found && options == MTLPipelineOptionFailOnBinaryArchiveMiss) {
        set_error(error, @"AGXMetal", 2, "the archives have no such pipeline");
        return nil;
    }
    if (!found) count(UMFA_COUNT_COMPILED);
    if (fault(UMFA_FAULT_PIPELINE)) {
        set_error(error, @"AGXMetal", 3, "injected: compiler encountered an internal error");
        return nil;
    }
    UMFAPipeline* pipeline = [UMFAPipeline new];
    pipeline->kernel = ((UMFAFunction*)descriptor.computeFunction)->kernel;
    uint64_t bytes = 0;
    std::string reason;
    if (!prepare(pipeline->kernel, bytes, reason)) {
        set_error(error, @"AGXMetal", 3, reason.c_str());
        [pipeline release];
        return nil;
    }
    int64_t limit = 0;
    pipeline->max_threads = static_cast<NSUInteger>(max_threads);
    if (fault(UMFA_FAULT_PIPELINE_THREADS, &limit))
        pipeline->max_threads = static_cast<NSUInteger>(limit);
    pipeline->static_bytes = bytes;
    if (fault(UMFA_FAULT_PIPELINE_MEMORY, &limit))
        pipeline->static_bytes = static_cast<NSUInteger>(limit);
    return pipeline;
}
- (id<MTLBinaryArchive>)newBinaryArchiveWithDescriptor:(MTLBinaryArchiveDescriptor*)descriptor
                                                 error:(NSError**)error {
    if (fault(UMFA_FAULT_ARCHIVE)) {
        set_error(error, @"MTLBinaryArchiveDomain", 1, "injected: no archive");
        return nil;
    }
    UMFAArchive* archive = [UMFAArchive new];
    if (!descriptor.url) return archive;
    if (fault(UMFA_FAULT_ARCHIVE_CRASH)) _exit(9);
    std::ifstream stream(descriptor.url.path.UTF8String);
    std::string line;
    // What Metal does with a damaged archive is not documented.
    if (!std::getline(stream, line) || line != archive_start)
        violation("newBinaryArchiveWithDescriptor: the file is no archive");
    while (std::getline(stream, line)) archive->kernels.insert(line);
    return archive;
}
@end

id<MTLDevice> metal_double::new_device(int number) {
    const Machine machine = metal_double::machine();
    if (number < 0 || number >= static_cast<int>(machine.devices.size())) return nil;
    UMFADevice* device = [UMFADevice new];
    device->facts = machine.devices[static_cast<size_t>(number)];
    device->number = number;
    device->max_threads = machine.max_threads;
    return device;
}

extern "C" id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
    return new_device(metal_double::machine().usual);
}

extern "C" NSArray<id<MTLDevice>>* MTLCopyAllDevices(void) {
    NSArray* devices = [NSArray new];
    for (int number = 0; number < metal_double::machine().listed; ++number) {
        id<MTLDevice> device = new_device(number);
        [devices umfaAdd:device];
        [device release];
    }
    return devices;
}

extern "C" int32_t umfa_double_compile(const char* name, const char* value, char* error,
                                       size_t capacity) {
    @autoreleasepool {
        id<MTLDevice> device = [new_device(0) autorelease];
        MTLCompileOptions* options = [[MTLCompileOptions new] autorelease];
        options.languageVersion = MTLLanguageVersion3_1;
        options.fastMathEnabled = NO;
        NSMutableDictionary* macros = [[NSMutableDictionary new] autorelease];
        [macros setObject:[NSString stringWithUTF8String:value]
                   forKey:[NSString stringWithUTF8String:name]];
        options.preprocessorMacros = macros;
        NSError* reason = nil;
        id<MTLLibrary> library = [device newLibraryWithSource:@"" options:options error:&reason];
        if (!library) std::snprintf(error, capacity, "%s", reason.localizedDescription.UTF8String);
        [library release];
        return library ? 0 : 1;
    }
}
