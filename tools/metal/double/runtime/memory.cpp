// Reference counts, weak references and autorelease pools: the functions that ARC calls.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "abi.h"
#include "double.h"

using objc::Class;
using objc::header;
using objc::Object;
using objc::Selector;

namespace {

bool is_class(const Object* object) {
    return (object->isa->data->flags & objc::flag_metaclass) != 0;
}

/// Classes and string literals, which no one allocates.
bool is_immortal(const Object* object) {
    static Class* const literal = objc::find_class("NSConstantString");
    return object->isa == literal || is_class(object);
}

/// Constructors or destructors of C++ instance variables.
void run_cxx(Object* object, Class* type, Selector selector, bool construct) {
    if (type == nullptr) return;
    if (construct) run_cxx(object, type->super, selector, construct);
    const auto found = type->table->find(selector);
    if (found != type->table->end())
        reinterpret_cast<void (*)(Object*, Selector)>(found->second)(object, selector);
    if (!construct) run_cxx(object, type->super, selector, construct);
}

std::mutex weak_lock;
auto& weak_references() {
    static auto* table = new std::unordered_multimap<Object*, Object**>;
    return *table;
}

void forget_weak(Object** place) {
    const auto range = weak_references().equal_range(*place);
    for (auto i = range.first; i != range.second; ++i)
        if (i->second == place) {
            weak_references().erase(i);
            return;
        }
}

std::atomic<int64_t> autoreleased_without_pool{0};

struct Pool {
    std::vector<Object*> objects;  // null: where a pool begins
    int depth = 0;
    ~Pool() { drain(0); }
    void drain(size_t size);
};
thread_local Pool pool;

}  // namespace

extern "C" {

Object* umfa_objc_alloc(Class* type) {
    void* memory = std::calloc(1, sizeof(objc::Header) + type->data->size);
    if (memory == nullptr) std::abort();
    auto* start = new (memory) objc::Header;
    start->count = 1;
    objc::count_live(type, 1);
    auto* object = reinterpret_cast<Object*>(start + 1);
    object->isa = type;
    static const Selector construct = objc::unique(".cxx_construct");
    run_cxx(object, type, construct, true);
    return object;
}

void umfa_objc_dealloc(Object* object) {
    static const Selector destruct = objc::unique(".cxx_destruct");
    run_cxx(object, object->isa, destruct, false);
    objc::count_live(object->isa, -1);
    object->isa = nullptr;
    std::free(header(object));
}

Object* objc_retain(Object* object) {
    if (object == nullptr) return object;
    if (objc::is_block(object)) return static_cast<Object*>(_Block_copy(object));
    if (!is_immortal(object)) header(object)->count.fetch_add(1, std::memory_order_relaxed);
    return object;
}

void objc_release(Object* object) {
    if (object == nullptr) return;
    if (objc::is_block(object)) return _Block_release(object);
    if (is_immortal(object)) return;
    const int64_t left = header(object)->count.fetch_sub(1, std::memory_order_acq_rel) - 1;
    if (left < 0) {
        std::fprintf(stderr, "double: over-release of a %s\n", object->isa->data->name);
        std::abort();
    }
    if (left > 0) return;
    if (header(object)->weakly_referenced) {
        const std::lock_guard guard(weak_lock);
        const auto range = weak_references().equal_range(object);
        for (auto i = range.first; i != range.second; ++i) *i->second = nullptr;
        weak_references().erase(range.first, range.second);
    }
    objc::send<void>(object, "dealloc");
}

int64_t umfa_objc_retain_count(Object* object) { return header(object)->count; }

// ---- autorelease pools ---------------------------------------------------------------------------

void* objc_autoreleasePoolPush() {
    ++pool.depth;
    pool.objects.push_back(nullptr);
    return reinterpret_cast<void*>(pool.objects.size());
}

void objc_autoreleasePoolPop(void* token) {
    --pool.depth;
    pool.drain(reinterpret_cast<size_t>(token) - 1);
}

Object* objc_autorelease(Object* object) {
    if (object == nullptr) return object;
    if (pool.depth == 0) ++autoreleased_without_pool;  // on a Mac: kept until the thread ends
    pool.objects.push_back(object);
    return object;
}

int64_t umfa_double_without_pool() { return autoreleased_without_pool; }

Object* objc_retainAutorelease(Object* object) { return objc_autorelease(objc_retain(object)); }
Object* objc_autoreleaseReturnValue(Object* object) { return objc_autorelease(object); }
Object* objc_retainAutoreleaseReturnValue(Object* object) {
    return objc_autorelease(objc_retain(object));
}
// The handshake by which a Mac skips the pool is an optimisation: here every value takes the pool.
Object* objc_retainAutoreleasedReturnValue(Object* object) { return objc_retain(object); }
Object* objc_claimAutoreleasedReturnValue(Object* object) { return objc_retain(object); }
Object* objc_unsafeClaimAutoreleasedReturnValue(Object* object) { return object; }

void objc_storeStrong(Object** place, Object* object) {
    Object* old = *place;
    if (old == object) return;
    objc_retain(object);
    *place = object;
    objc_release(old);
}

Object* objc_retainBlock(Object* block) { return static_cast<Object*>(_Block_copy(block)); }

// ---- weak references -----------------------------------------------------------------------------

Object* objc_storeWeak(Object** place, Object* object) {
    const std::lock_guard guard(weak_lock);
    if (*place != nullptr) forget_weak(place);
    *place = object;
    if (object != nullptr) {
        header(object)->weakly_referenced = true;
        weak_references().emplace(object, place);
    }
    return object;
}

Object* objc_initWeak(Object** place, Object* object) {
    *place = nullptr;
    return objc_storeWeak(place, object);
}

void objc_destroyWeak(Object** place) { objc_storeWeak(place, nullptr); }

Object* objc_loadWeakRetained(Object** place) {
    const std::lock_guard guard(weak_lock);
    Object* object = *place;
    if (object == nullptr) return nullptr;
    int64_t count = header(object)->count;
    do {
        if (count <= 0) return nullptr;
    } while (!header(object)->count.compare_exchange_weak(count, count + 1));
    return object;
}

Object* objc_loadWeak(Object** place) { return objc_autorelease(objc_loadWeakRetained(place)); }

void objc_copyWeak(Object** to, Object** from) {
    Object* object = objc_loadWeakRetained(from);
    objc_initWeak(to, object);
    objc_release(object);
}

void objc_moveWeak(Object** to, Object** from) {
    objc_copyWeak(to, from);
    objc_destroyWeak(from);
}

// ---- shortcuts that clang emits for common messages, and properties ------------------------------

Object* objc_alloc(Class* type) {
    return objc::send<Object*>(reinterpret_cast<Object*>(type), "alloc");
}
Object* objc_allocWithZone(Class* type) { return objc_alloc(type); }
Object* objc_alloc_init(Class* type) { return objc::send<Object*>(objc_alloc(type), "init"); }
Object* objc_opt_new(Class* type) { return objc_alloc_init(type); }
Object* objc_opt_self(Object* object) { return object; }
Class* objc_opt_class(Object* object) {
    if (object == nullptr) return nullptr;
    return is_class(object) ? reinterpret_cast<Class*>(object) : object->isa;
}
bool umfa_objc_is_kind(Object* object, Class* wanted);
bool umfa_objc_responds(Object* object, Selector selector);
bool objc_opt_isKindOfClass(Object* object, Class* type) {
    return object != nullptr && umfa_objc_is_kind(object, type);
}
bool objc_opt_respondsToSelector(Object* object, Selector selector) {
    return object != nullptr && umfa_objc_responds(object, selector);
}

Object* objc_getProperty(Object* object, Selector, ptrdiff_t offset, bool) {
    static std::mutex lock;
    const std::lock_guard guard(lock);
    return objc_autorelease(
        objc_retain(*reinterpret_cast<Object**>(reinterpret_cast<char*>(object) + offset)));
}

void objc_setProperty_nonatomic(Object* object, Selector, Object* value, ptrdiff_t offset) {
    objc_storeStrong(reinterpret_cast<Object**>(reinterpret_cast<char*>(object) + offset), value);
}
void objc_setProperty_atomic(Object* object, Selector selector, Object* value, ptrdiff_t offset) {
    objc_setProperty_nonatomic(object, selector, value, offset);
}
// The double's copyable values are immutable, or blocks: retaining is copying.
void objc_setProperty_nonatomic_copy(Object* object, Selector selector, Object* value,
                                     ptrdiff_t offset) {
    Object* copy = objc_retain(value);
    objc_setProperty_nonatomic(object, selector, copy, offset);
    objc_release(copy);
}
void objc_setProperty_atomic_copy(Object* object, Selector selector, Object* value,
                                  ptrdiff_t offset) {
    objc_setProperty_nonatomic_copy(object, selector, value, offset);
}

void objc_enumerationMutation(Object*) { std::abort(); }
}

void Pool::drain(size_t size) {
    while (objects.size() > size) {
        Object* object = objects.back();
        objects.pop_back();
        objc_release(object);
    }
}
