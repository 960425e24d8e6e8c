// Access to tensors whose dtype differs from the kernel's type T. Only float kernels read other
// dtypes. `kind` is a function constant (constants.h), so each function compiles to one branch.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"

using namespace metal;

namespace umfa {

/// The 16-bit types that a kernel of type T reads: half and bfloat if T is float, else only T.
template <typename T>
struct Narrow {
    using Half = T;
    using Bfloat = T;
};
template <>
struct Narrow<float> {
    using Half = half;
    using Bfloat = bfloat;
};

/// `from` advanced by `elements`. Uses pointers of the element type, because byte offsets change
/// the address code that the compiler generates in loops. Strides of codes are in bytes.
template <typename T>
inline device const uchar* moved(device const uchar* from, int kind, int64_t elements) {
    if (kind == UMFA_KIND_CODES) return from + elements;
    if (kind == UMFA_MASK_NONE)
        return reinterpret_cast<device const uchar*>(reinterpret_cast<device const T*>(from) +
                                                     elements);
    return reinterpret_cast<device const uchar*>(reinterpret_cast<device const ushort*>(from) +
                                                 elements);
}
template <typename T>
inline device uchar* moved(device uchar* from, int kind, int64_t elements) {
    if (kind == UMFA_MASK_NONE)
        return reinterpret_cast<device uchar*>(reinterpret_cast<device T*>(from) + elements);
    return reinterpret_cast<device uchar*>(reinterpret_cast<device ushort*>(from) + elements);
}

/// Rounds x and writes it as element `index`.
template <typename T, typename X>
inline void store_any(device uchar* to, int kind, int64_t index, X x) {
    if (kind == UMFA_MASK_F16)
        reinterpret_cast<device typename Narrow<T>::Half*>(to)[index] = typename Narrow<T>::Half(x);
    else if (kind == UMFA_MASK_BF16)
        reinterpret_cast<device typename Narrow<T>::Bfloat*>(to)[index] =
            typename Narrow<T>::Bfloat(x);
    else
        reinterpret_cast<device T*>(to)[index] = T(x);
}

}  // namespace umfa
