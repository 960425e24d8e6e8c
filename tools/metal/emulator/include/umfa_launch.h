// Turns what a dispatch binds into a kernel's arguments, by their C++ types.
#pragma once
#include "metal_types"
#include "umfa_signature.h"

namespace umfa_backend {

template <typename T>
struct bound {
    static_assert(sizeof(T) == 0, "a [[buffer]] parameter is a pointer or a reference");
};
template <typename T>
struct bound<T*> {
    static constexpr bool writable = !__is_const(T);
    static T* buffer(unsigned index) {
        typedef typename remove_qualifiers<T>::type element;
        if constexpr (__is_void(element)) {
            return (T*)(unsigned long)umfa_buffer(index, 1, 1);
        } else {
            return (T*)(unsigned long)umfa_buffer(index, sizeof(T), alignof(element));
        }
    }
    static T* threadgroup_memory(unsigned index) {
        return (T*)(unsigned long)umfa_threadgroup_memory(index);
    }
};
template <typename T>
struct bound<T&> {
    static constexpr bool writable = !__is_const(T);
    static T& buffer(unsigned index) { return *bound<T*>::buffer(index); }
    static T& threadgroup_memory(unsigned index) { return *bound<T*>::threadgroup_memory(index); }
};

/// A built-in such as thread_position_in_grid, in as many components as the kernel asks for.
template <typename T>
T launch_value(unsigned what) {
    typedef typename shape<T>::element element;
    static_assert(__is_same(element, uint) || __is_same(element, ushort),
                  "built-in arguments are uint or ushort");
    if constexpr (shape<T>::is_vector) {
        T v;
        for (int i = 0; i < shape<T>::size; i++)
            v[i] = static_cast<element>(umfa_launch_value(what, static_cast<unsigned>(i)));
        return v;
    } else {
        return static_cast<T>(umfa_launch_value(what, 0));
    }
}

}  // namespace umfa_backend
