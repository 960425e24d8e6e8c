// What clang emits for Objective-C with -fobjc-runtime=macosx-13.0: Apple's non-fragile ABI, as far
// as the double's runtime reads it. The layouts are the compiler's; nothing here may change.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace objc {

using Selector = const char*;
using Method = void (*)();

struct MethodEntry {
    Selector selector;
    const char* types;
    Method method;
};

struct MethodList {
    uint32_t entry_bytes, count;
    MethodEntry first;  // of `count`
};

struct Ivar {
    int32_t* offset;
    const char *name, *type;
    uint32_t alignment, size;
};

struct IvarList {
    uint32_t entry_bytes, count;
    Ivar first;
};

struct ProtocolList;
struct Protocol {
    void* isa;
    const char* name;
    ProtocolList* protocols;
};

struct ProtocolList {
    uint64_t count;
    Protocol* first;
};

constexpr uint32_t flag_metaclass = 1;

struct ClassData {
    uint32_t flags, start, size, reserved;
    const uint8_t* strong_layout;
    const char* name;
    MethodList* methods;
    ProtocolList* protocols;
    IvarList* ivars;
    const uint8_t* weak_layout;
    void* properties;
};

using MethodTable = std::unordered_map<Selector, Method>;

struct Class {
    Class* isa;
    Class* super;
    MethodTable* table;  // the compiler puts Apple's empty cache here; replaced at load
    void* vtable;
    ClassData* data;
};

struct Category {
    const char* name;
    Class* target;
    MethodList *instance_methods, *class_methods;
    ProtocolList* protocols;
};

struct Object {
    Class* isa;
};

struct Super {
    Object* self;
    Class* current;
};

// In front of every object that the runtime allocates.
struct alignas(16) Header {
    std::atomic<int64_t> count;
    std::atomic<bool> weakly_referenced;
};

inline Header* header(Object* object) { return reinterpret_cast<Header*>(object) - 1; }

/// The one copy of a selector's text: selectors compare by address.
Selector unique(const char* name);
Class* find_class(const char* name);
/// Aborts when there is none, as a Mac raises.
Method method_of(Object* object, Selector selector);
Method find_method(Class* type, Selector selector);
bool is_block(const Object* object);

template <class Result>
Result send(Object* object, const char* name) {
    const Selector selector = unique(name);
    return reinterpret_cast<Result (*)(Object*, Selector)>(method_of(object, selector))(object,
                                                                                        selector);
}

/// Counts of what lives, by class.
void count_live(Class* type, int64_t difference);

}  // namespace objc

extern "C" {
void* _Block_copy(const void* block);
void _Block_release(const void* block);
extern void* _NSConcreteGlobalBlock[32];
extern void* _NSConcreteStackBlock[32];
extern void* _NSConcreteMallocBlock[32];
}
