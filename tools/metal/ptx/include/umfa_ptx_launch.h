// Turns the parameters of a PTX entry into a Metal kernel's arguments, by their C++ types.
#pragma once
#include "metal_types"
#include "umfa_signature.h"

#define UMFA_ENTRY extern "C" __attribute__((nvptx_kernel)) void

namespace umfa_backend {

/// Threads of a threadgroup. A block is one-dimensional, and holds as many.
struct extents {
    unsigned x, y, z;
};

/// How a [[buffer]] or [[threadgroup]] parameter, a pointer or a reference, comes into an entry.
template <typename T>
struct bound {
    static_assert(sizeof(T) == 0, "a [[buffer]] parameter is a pointer or a reference");
};
template <typename T>
struct bound<T*> {
    typedef T* pointer;
    static constexpr bool writable = !__is_const(T);
    UMFA_INLINE_HEADER static T* value(T* p) { return p; }
};
template <typename T>
struct bound<T&> {
    typedef T* pointer;
    static constexpr bool writable = !__is_const(T);
    UMFA_INLINE_HEADER static T& value(T* p) { return *p; }
};

UMFA_INLINE_HEADER unsigned block(unsigned axis) {
    return axis == 0   ? __nvvm_read_ptx_sreg_ctaid_x()
           : axis == 1 ? __nvvm_read_ptx_sreg_ctaid_y()
                       : __nvvm_read_ptx_sreg_ctaid_z();
}
UMFA_INLINE_HEADER unsigned blocks(unsigned axis) {
    return axis == 0   ? __nvvm_read_ptx_sreg_nctaid_x()
           : axis == 1 ? __nvvm_read_ptx_sreg_nctaid_y()
                       : __nvvm_read_ptx_sreg_nctaid_z();
}

UMFA_INLINE_HEADER unsigned launch_number(unsigned what, unsigned axis, extents threads) {
    const unsigned size = axis == 0 ? threads.x : axis == 1 ? threads.y : threads.z;
    const unsigned index = (hardware_thread() & ~31U) + lane();
    const unsigned position = axis == 0   ? index % threads.x
                              : axis == 1 ? index / threads.x % threads.y
                                          : index / (threads.x * threads.y);
    switch (what) {
        case thread_position_in_grid: return block(axis) * size + position;
        case threadgroup_position_in_grid: return block(axis);
        case threadgroups_per_grid: return blocks(axis);
        case thread_position_in_threadgroup: return position;
        case threads_per_threadgroup: return size;
        case threads_per_grid: return blocks(axis) * size;
        case thread_index_in_threadgroup: return index;
        case thread_index_in_simdgroup: return lane();
        case simdgroup_index_in_threadgroup: return hardware_thread() / 32;
        case threads_per_simdgroup: return 32;
        case thread_index_in_quadgroup: return index % 4;
        case quadgroup_index_in_threadgroup: return index / 4;
        case quadgroups_per_threadgroup: return (threads.x * threads.y * threads.z + 3) / 4;
        default: return (threads.x * threads.y * threads.z + 31) / 32;
    }
}

/// A built-in argument, in as many components as the kernel asks for.
template <typename T>
UMFA_INLINE_HEADER T launch_value(unsigned what, extents threads) {
    typedef typename shape<T>::element element;
    static_assert(__is_same(element, uint) || __is_same(element, ushort),
                  "built-in arguments are uint or ushort");
    if constexpr (shape<T>::is_vector) {
        T v;
        for (unsigned i = 0; i < shape<T>::size; i++)
            v[i] = static_cast<element>(launch_number(what, i, threads));
        return v;
    } else {
        return static_cast<T>(launch_number(what, 0, threads));
    }
}

}  // namespace umfa_backend

/// Memory of the [[threadgroup(n)]] parameters, one after the other.
extern __attribute__((aligned(16))) threadgroup unsigned char umfa_dynamic_memory[];
