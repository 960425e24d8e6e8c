// Blocks: copied to the heap with what they capture, and released.
#include <cstdlib>
#include <cstring>

#include "abi.h"

extern "C" {
objc::Object* objc_retain(objc::Object* object);
void objc_release(objc::Object* object);
void* _NSConcreteGlobalBlock[32];
void* _NSConcreteStackBlock[32];
void* _NSConcreteMallocBlock[32];
}

namespace {

struct Descriptor {
    unsigned long reserved, size;
    void (*copy)(void* to, const void* from);
    void (*dispose)(const void* block);
};

struct Block {
    void* isa;
    std::atomic<int32_t> flags;
    int32_t reserved;
    void (*invoke)();
    Descriptor* descriptor;
};

/// A __block variable.
struct Shared {
    void* isa;
    Shared* forwarding;
    std::atomic<int32_t> flags;
    int32_t size;
    void (*keep)(Shared* to, Shared* from);
    void (*destroy)(Shared* variable);
};

enum : int32_t {
    count_mask = 0xfffe,  // the count itself is in steps of two
    on_heap = 1 << 24,
    has_helpers = 1 << 25,
    global = 1 << 28,
};

// How a captured variable is held, as clang spells it.
enum : int { field_object = 3, field_block = 7, field_shared = 8, field_caller = 128 };

Shared* copy_shared(const void* variable) {
    auto* source = static_cast<const Shared*>(variable)->forwarding;
    if ((source->flags & on_heap) != 0) {
        source->flags += 2;
        return source;
    }
    auto* copy = static_cast<Shared*>(std::malloc(static_cast<size_t>(source->size)));
    std::memcpy(static_cast<void*>(copy), source, static_cast<size_t>(source->size));
    copy->flags = (source->flags & ~count_mask) | on_heap | 4;  // the block's and the frame's
    copy->forwarding = source->forwarding = copy;
    if ((source->flags & has_helpers) != 0) source->keep(copy, source);
    return copy;
}

void release_shared(const void* variable) {
    auto* source = static_cast<const Shared*>(variable)->forwarding;
    if ((source->flags & on_heap) == 0 || ((source->flags -= 2) & count_mask) != 0) return;
    if ((source->flags & has_helpers) != 0) source->destroy(source);
    std::free(source);
}

}  // namespace

extern "C" {

void* _Block_copy(const void* block) {
    auto* source = static_cast<Block*>(const_cast<void*>(block));
    if (source == nullptr || (source->flags & global) != 0) return source;
    if ((source->flags & on_heap) != 0) {
        source->flags += 2;
        return source;
    }
    auto* copy = static_cast<Block*>(std::malloc(source->descriptor->size));
    std::memcpy(static_cast<void*>(copy), source, source->descriptor->size);
    copy->isa = _NSConcreteMallocBlock;
    copy->flags = (source->flags & ~0xffff) | on_heap | 2;
    if ((copy->flags & has_helpers) != 0) copy->descriptor->copy(copy, source);
    return copy;
}

void _Block_release(const void* block) {
    auto* source = static_cast<Block*>(const_cast<void*>(block));
    if (source == nullptr || (source->flags & on_heap) == 0) return;
    if (((source->flags -= 2) & count_mask) != 0) return;
    if ((source->flags & has_helpers) != 0) source->descriptor->dispose(source);
    std::free(source);
}

void _Block_object_assign(void* to, const void* from, int field) {
    if ((field & 0x1f) == field_shared)
        *static_cast<Shared**>(to) = copy_shared(from);
    else if ((field & field_caller) != 0)
        *static_cast<const void**>(to) = from;
    else if ((field & field_block) == field_block)
        *static_cast<void**>(to) = _Block_copy(from);
    else
        *static_cast<void**>(to) = objc_retain(static_cast<objc::Object*>(const_cast<void*>(from)));
}

void _Block_object_dispose(const void* captured, int field) {
    if ((field & 0x1f) == field_shared)
        release_shared(captured);
    else if ((field & field_caller) != 0)
        return;
    else if ((field & field_block) == field_block)
        _Block_release(captured);
    else
        objc_release(static_cast<objc::Object*>(const_cast<void*>(captured)));
}
}
