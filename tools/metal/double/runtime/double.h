// What tests ask of the double. Plain C, so that ctypes reaches it too.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define UMFA_DOUBLE_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// ---- what is alive -------------------------------------------------------------------------------

/// Objects that live now; `text` gets a line for each class that has some.
UMFA_DOUBLE_API int64_t umfa_double_live(char* text, size_t capacity);
/// Objects autoreleased so far while no pool was there.
UMFA_DOUBLE_API int64_t umfa_double_without_pool(void);
/// What Metal's validation layer would have stopped at, one a line; clears it. Returns the count.
UMFA_DOUBLE_API int64_t umfa_double_violations(char* text, size_t capacity);

// ---- umfa ----------------------------------------------------------------------------------------

/// Makes umfa's Metal backend, the real one, part of the routing (or not any more).
UMFA_DOUBLE_API void umfa_double_install(int32_t on);
/// Lets umfa's Metal backend go of everything that it keeps between calls.
UMFA_DOUBLE_API void umfa_double_release(void);
/// Sets after how long a case of umfa's self-test counts as hung.
UMFA_DOUBLE_API void umfa_double_self_test_patience(int64_t milliseconds);

// ---- the machine ---------------------------------------------------------------------------------

enum { UMFA_CORES_ABSENT = 0, UMFA_CORES_NUMBER = 1, UMFA_CORES_TEXT = 2 };

typedef struct {
    const char* name;          // e.g. "Apple M1"
    const char* architecture;  // e.g. "applegpu_g13g"
    int32_t family;            // newest of Apple's GPU families that it has: 5 to 10
    int32_t unified;           // whether it shares the CPU's memory
    const char* driver;        // the class of its driver in the I/O registry; "": it has none
    int32_t same_id;           // whether Metal's registryID is that of the driver
    int32_t cores_kind;        // UMFA_CORES_...: how the driver says how many cores there are
    int64_t cores;
} umfa_double_device;

typedef struct {
    int32_t device_count;
    const umfa_double_device* devices;
    int32_t listed;       // how many of them MTLCopyAllDevices has, from the first
    int32_t usual;        // the one that MTLCreateSystemDefaultDevice returns; -1: nil
    int32_t max_threads;  // of every pipeline
    int32_t shuffle;      // seed of the order in which unordered dispatches run
} umfa_double_machine;
UMFA_DOUBLE_API void umfa_double_set_machine(const umfa_double_machine* machine);

enum umfa_double_fault_kind {
    UMFA_FAULT_QUEUE = 0,             // newCommandQueue returns nil
    UMFA_FAULT_LIBRARY = 1,           // newLibraryWith... fails
    UMFA_FAULT_FUNCTION = 2,          // newFunctionWithName fails
    UMFA_FAULT_PIPELINE = 3,          // newComputePipelineState fails
    UMFA_FAULT_PIPELINE_THREADS = 4,  // the pipeline takes at most `value` threads
    UMFA_FAULT_PIPELINE_MEMORY =
        5,                   // the pipeline says it needs `value` bytes of threadgroup memory
    UMFA_FAULT_BUFFER = 6,   // newBufferWithLength returns nil
    UMFA_FAULT_NO_COPY = 7,  // newBufferWithBytesNoCopy returns nil
    UMFA_FAULT_COMMAND_BUFFER = 8,  // commandBuffer returns nil
    UMFA_FAULT_ENCODER = 9,         // computeCommandEncoder returns nil
    UMFA_FAULT_EXECUTION = 10,      // the command buffer ends with error code `value`
    UMFA_FAULT_REGISTRY = 11,       // IOServiceGetMatchingServices fails
    UMFA_FAULT_ARCHIVE = 12,        // newBinaryArchiveWithDescriptor fails
    UMFA_FAULT_ARCHIVE_ADD = 13,    // addComputePipelineFunctionsWithDescriptor fails
    UMFA_FAULT_ARCHIVE_WRITE = 14,  // serializeToURL fails
    UMFA_FAULT_ARCHIVE_CRASH = 15,  // the process ends when it opens an archive's file
    UMFA_FAULT_KINDS = 16
};
/// After `skip` times, the operation fails `count` times. Replaces an earlier fault of the kind.
UMFA_DOUBLE_API void umfa_double_fault(int32_t kind, int32_t skip, int32_t count, int64_t value);
UMFA_DOUBLE_API void umfa_double_clear_faults(void);

enum umfa_double_count_kind {
    UMFA_COUNT_LIBRARIES = 0,  // compiled from text
    UMFA_COUNT_COMPILED = 1,   // pipelines that no archive had
    UMFA_COUNT_KINDS = 2
};
/// How often Metal's compiler has run since the double was loaded.
UMFA_DOUBLE_API int64_t umfa_double_count(int32_t kind);

// ---- the GPU -------------------------------------------------------------------------------------

typedef struct {
    uint32_t index;
    uint32_t is_bytes;  // of setBytes
    void* data;
    uint64_t length, offset;
} umfa_double_buffer;

typedef struct {
    const char* source;  // Metal text, flattened, with its macros defined in front
    const char* kernel;
    uint32_t constant_count;
    const uint32_t* constant_indices;
    const uint32_t* constant_types;  // MTLDataType: 29 int, 53 bool
    const int32_t* constant_values;
    // Of a dispatch; zero when a pipeline is made.
    uint32_t buffer_count;
    const umfa_double_buffer* buffers;
    uint32_t threadgroups[3], threads[3];
} umfa_double_kernel;

/// Makes a pipeline (writes its static threadgroup memory), or runs a dispatch. Not 0: an error,
/// whose text goes to `error`.
typedef int (*umfa_double_prepare_fn)(const umfa_double_kernel* kernel, uint64_t* static_bytes,
                                      char* error, size_t capacity);
typedef int (*umfa_double_run_fn)(const umfa_double_kernel* kernel, char* error, size_t capacity);
UMFA_DOUBLE_API void umfa_double_set_gpu(umfa_double_prepare_fn prepare, umfa_double_run_fn run);

/// Compiles an empty text with one entry of preprocessorMacros. Not 0: refused, and why.
UMFA_DOUBLE_API int32_t umfa_double_compile(const char* name, const char* value, char* error,
                                            size_t capacity);

// ---- Metal objects for tests, as another framework would bring them --------------------------------

/// An MTLBuffer (retained) of shared memory; umfa_double_object_release gives it back.
UMFA_DOUBLE_API void* umfa_double_new_buffer(uint64_t length);
/// On the machine's device of that number; the others are on the first.
UMFA_DOUBLE_API void* umfa_double_new_buffer_on(int32_t device, uint64_t length);
UMFA_DOUBLE_API void* umfa_double_buffer_contents(void* buffer);
UMFA_DOUBLE_API void* umfa_double_new_queue(void);
UMFA_DOUBLE_API void* umfa_double_new_queue_on(int32_t device);
UMFA_DOUBLE_API void* umfa_double_new_command_buffer(void* queue);
UMFA_DOUBLE_API void umfa_double_commit(void* command_buffer);
/// The status after waiting: 4 completed, 5 error.
UMFA_DOUBLE_API int32_t umfa_double_wait(void* command_buffer);
UMFA_DOUBLE_API int32_t umfa_double_status(void* command_buffer);
UMFA_DOUBLE_API void umfa_double_object_release(void* object);

#ifdef __cplusplus
}
#endif
