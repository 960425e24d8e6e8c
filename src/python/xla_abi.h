// The part of XLA's C interface for custom calls (FFI, xla/ffi/api/c_api.h) that umfa uses, so that a
// build needs no headers of jaxlib's. A test compares it with those.
//
// XLA promises not to break it: structs grow at their ends, and say in `struct_size` how far.
#pragma once

#include <cstddef>
#include <cstdint>

namespace umfa::xla {

constexpr int api_major = 0;
/// Of releases that do not show theirs, and that run handlers of the same minor version only.
constexpr int first_api_minor = 1;

enum class ExtensionType : int { metadata = 1 };

struct Extension {
    size_t struct_size;
    ExtensionType type;
    Extension* next;
};

struct ApiVersion {
    size_t struct_size;
    Extension* extension_start;
    int major_version, minor_version;
};

/// What XLA asks a handler about itself; later fields are not for handlers without state.
struct Metadata {
    size_t struct_size;
    ApiVersion api_version;
    uint32_t traits;
};

struct MetadataExtension {
    Extension base;
    Metadata* metadata;
};

enum class ErrorCode : int {
    invalid_argument = 3,
    resource_exhausted = 8,
    unimplemented = 12,
    internal = 13,
};

struct Error;  // XLA's

struct ErrorCreateArguments {
    size_t struct_size;
    Extension* extension_start;
    const char* message;
    ErrorCode code;
};

struct Api {
    size_t struct_size;
    Extension* extension_start;
    ApiVersion api_version;
    const void* internal;
    Error* (*create_error)(ErrorCreateArguments*);
};

enum class DataType : int {
    pred = 1,
    s8 = 2,
    s16 = 3,
    s32 = 4,
    s64 = 5,
    u8 = 6,
    u16 = 7,
    u32 = 8,
    u64 = 9,
    f16 = 10,
    f32 = 11,
    f64 = 12,
    bf16 = 16,
};

/// Dense, the last dimension innermost.
struct Buffer {
    size_t struct_size;
    Extension* extension_start;
    DataType dtype;
    void* data;
    int64_t rank;
    int64_t* dims;
};

/// Arguments or results. All that XLA has are buffers.
struct Buffers {
    size_t struct_size;
    Extension* extension_start;
    int64_t size;
    int* types;
    Buffer** buffers;
};
constexpr int type_buffer = 1;

struct Text {
    const char* data;
    size_t size;
};

struct Scalar {
    DataType dtype;
    void* value;
};

struct Array {
    DataType dtype;
    size_t size;
    void* data;
};

enum class AttributeType : int { array = 1, dictionary = 2, scalar = 3, string = 4 };

struct Attributes {
    size_t struct_size;
    Extension* extension_start;
    int64_t size;
    AttributeType* types;
    Text** names;
    void** values;
};

struct CallFrame {
    size_t struct_size;
    Extension* extension_start;
    const Api* api;
    void* context;
    int stage;
    Buffers arguments, results;
    Attributes attributes;
};

}  // namespace umfa::xla
