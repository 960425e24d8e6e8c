// Classes, selectors and messages of the double's Objective-C runtime.
//
// On ELF clang puts the metadata into sections whose names are C identifiers, so that the linker's
// __start_ and __stop_ symbols find those of this image (and of no other: the double and what it
// serves are one shared library).
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_set>

#include "abi.h"
#include "double.h"

#define UMFA_SECTION(Type, name)                                                             \
    extern "C" Type __start_##name[] __attribute__((weak, visibility("hidden"))); /*NOLINT*/ \
    extern "C" Type __stop_##name[] __attribute__((weak, visibility("hidden")));

UMFA_SECTION(objc::Class*, objc_classlist)
UMFA_SECTION(objc::Category*, objc_catlist)
UMFA_SECTION(objc::Selector, objc_selrefs)

extern "C" void* _objc_empty_cache = nullptr;

namespace objc {
namespace {

std::mutex& registry_lock() {
    static auto* lock = new std::mutex;
    return *lock;
}

auto& classes() {
    static auto* table = new std::unordered_map<std::string, Class*>;
    return *table;
}

void add_methods(Class* type, MethodList* list) {
    if (type->table == nullptr || static_cast<void*>(type->table) == &_objc_empty_cache)
        type->table = new MethodTable;
    if (list == nullptr) return;
    char* at = reinterpret_cast<char*>(&list->first);
    for (uint32_t i = 0; i < list->count; ++i, at += list->entry_bytes & 0xfffcu) {
        auto* entry = reinterpret_cast<MethodEntry*>(at);
        entry->selector = unique(entry->selector);
        (*type->table)[entry->selector] = entry->method;
    }
}

/// Moves the instance variables behind those of the superclass.
void slide(Class* type) {
    static auto* done = new std::unordered_set<Class*>;
    if (!done->insert(type).second || type->super == nullptr) return;
    slide(type->super);
    const uint32_t wanted = type->super->data->size;
    if (type->data->start >= wanted) return;
    const uint32_t distance = (wanted - type->data->start + 15) & ~15u;
    type->data->start += distance;
    type->data->size += distance;
    if (IvarList* ivars = type->data->ivars)
        for (uint32_t i = 0; i < ivars->count; ++i)
            if (int32_t* offset = (&ivars->first)[i].offset)
                *offset += static_cast<int32_t>(distance);
}

__attribute__((constructor(101))) void load_image() {
    for (Selector* s = __start_objc_selrefs; s != nullptr && s < __stop_objc_selrefs; ++s)
        *s = unique(*s);
    for (Class** c = __start_objc_classlist; c != nullptr && c < __stop_objc_classlist; ++c) {
        classes()[(*c)->data->name] = *c;
        add_methods(*c, (*c)->data->methods);
        add_methods((*c)->isa, (*c)->isa->data->methods);
    }
    for (Class** c = __start_objc_classlist; c != nullptr && c < __stop_objc_classlist; ++c)
        slide(*c);
    for (Category** k = __start_objc_catlist; k != nullptr && k < __stop_objc_catlist; ++k) {
        add_methods((*k)->target, (*k)->instance_methods);
        add_methods((*k)->target->isa, (*k)->class_methods);
    }
}

std::atomic<int64_t> live_total{0};
std::mutex live_lock;
auto& live_by_class() {
    static auto* table = new std::unordered_map<Class*, int64_t>;
    return *table;
}

bool lists(ProtocolList* list, const char* name) {
    if (list == nullptr) return false;
    for (uint64_t i = 0; i < list->count; ++i) {
        Protocol* protocol = (&list->first)[i];
        if (std::strcmp(protocol->name, name) == 0 || lists(protocol->protocols, name)) return true;
    }
    return false;
}

}  // namespace

Selector unique(const char* name) {
    static auto* names = new std::unordered_set<std::string>;
    const std::lock_guard guard(registry_lock());
    return names->insert(name).first->c_str();
}

Class* find_class(const char* name) {
    const auto found = classes().find(name);
    return found == classes().end() ? nullptr : found->second;
}

Method find_method(Class* type, Selector selector) {
    for (; type != nullptr; type = type->super) {
        const auto found = type->table->find(selector);
        if (found != type->table->end()) return found->second;
    }
    return nullptr;
}

bool is_block(const Object* object) {
    const void* isa = object->isa;
    return isa == _NSConcreteStackBlock || isa == _NSConcreteMallocBlock ||
           isa == _NSConcreteGlobalBlock;
}

Method method_of(Object* object, Selector selector) {
    Method method = is_block(object) ? nullptr : find_method(object->isa, selector);
    if (method == nullptr) {
        std::fprintf(stderr, "double: unrecognized selector %s sent to %s\n", selector,
                     is_block(object) ? "a block" : object->isa->data->name);
        std::abort();
    }
    return method;
}

void count_live(Class* type, int64_t difference) {
    live_total += difference;
    const std::lock_guard guard(live_lock);
    live_by_class()[type] += difference;
}

}  // namespace objc

extern "C" {

using objc::Class;
using objc::Method;
using objc::Object;
using objc::Selector;

// Called from the assembly in send.cpp.
Method umfa_objc_lookup(Object* object, Selector selector) {
    return objc::method_of(object, selector);
}

Method umfa_objc_lookup_super(objc::Super* super, Selector selector) {
    Method method = objc::find_method(super->current->super, selector);
    if (method == nullptr) {
        std::fprintf(stderr, "double: no method %s in a superclass\n", selector);
        std::abort();
    }
    return method;
}

const char* class_getName(Class* type) { return type != nullptr ? type->data->name : "nil"; }

Class* object_getClass(Object* object) { return object != nullptr ? object->isa : nullptr; }

bool umfa_objc_responds(Object* object, Selector selector) {
    return objc::find_method(object->isa, selector) != nullptr;
}

bool umfa_objc_is_kind(Object* object, Class* wanted) {
    for (Class* type = object->isa; type != nullptr; type = type->super)
        if (type == wanted) return true;
    return false;
}

bool umfa_objc_conforms(Object* object, objc::Protocol* protocol) {
    for (Class* type = object->isa; type != nullptr; type = type->super)
        if (objc::lists(type->data->protocols, protocol->name)) return true;
    return false;
}

int64_t umfa_double_live(char* text, size_t capacity) {
    std::string names;
    {
        const std::lock_guard guard(objc::live_lock);
        for (const auto& [type, count] : objc::live_by_class())
            if (count != 0)
                names += std::string(type->data->name) + ": " + std::to_string(count) + "\n";
    }
    if (text != nullptr && capacity > 0) std::snprintf(text, capacity, "%s", names.c_str());
    return objc::live_total;
}
}
