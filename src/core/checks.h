// Checks that apply to every tensor of a call. They throw with the offending value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/export.h"
#include "core/tensor_view.h"

namespace umfa {

/// Throws in the name of one public function.
struct Checker {
    std::string_view function;

    [[noreturn]] void value(std::string_view what, const std::string& got,
                            const std::string& expected) const {
        fail(ErrorKind::value, function, what, got, expected);
    }
    [[noreturn]] void type(std::string_view what, const std::string& got,
                           const std::string& expected) const {
        fail(ErrorKind::type, function, what, got, expected);
    }
    [[noreturn]] void unsupported(std::string_view what, const std::string& got,
                                  const std::string& expected) const {
        fail(ErrorKind::unsupported, function, what, got, expected);
    }
};

/// An argument that may be absent, and its name.
template <class T>
struct Named {
    const std::optional<T>& given;
    const std::string& name;
};

// Dimensions are counted from the last: 1 is the last one. One that is not there has size 1.
inline int64_t size_at(const TensorView& view, int from_last) {
    return from_last <= view.ndim ? view.shape[view.ndim - from_last] : 1;
}

/// 0 where there is one index only, so that the dimension may broadcast.
inline int64_t stride_at(const TensorView& view, int from_last) {
    return size_at(view, from_last) == 1 ? 0 : view.strides[view.ndim - from_last];
}

/// Checks that must pass before the tensor's memory is read.
UMFA_CORE_API void check_memory(const Checker& check, const TensorView& view,
                                const std::string& name);
UMFA_CORE_API void check_float_dtype(const Checker& check, const TensorView& view,
                                     const std::string& name);
/// Dtype of a result: that of `out` if given, else `asked` if given, else `usual`.
DType checked_out_dtype(const Checker& check, const Named<DType>& asked,
                        const Named<TensorView>& out, DType usual);
/// Same dtype, device as the tensor called `as_name`.
void check_same_dtype(const Checker& check, const TensorView& view, const std::string& name,
                      const TensorView& as, const std::string& as_name);
void check_same_device(const Checker& check, const TensorView& view, const std::string& name,
                       const TensorView& as);

void check_overlap(const Checker& check, const TensorView& written, const std::string& name,
                   const TensorView& read, const std::string& other);
/// Likewise of two tensors that are both written.
void check_both_written(const Checker& check, const TensorView& written, const std::string& name,
                        const TensorView& too, const std::string& other);
/// True when no two indices may name the same element: sorted by stride, each dimension steps over
/// everything the smaller ones reach. Sufficient, and exact for every view made by slicing.
bool elements_distinct(const TensorView& view);
/// What must hold of a tensor that is written.
UMFA_CORE_API void check_distinct(const Checker& check, const TensorView& view,
                                  const std::string& name);
/// Whether two views are slices of one tensor that lie between one another without touching, as key
/// and value of a cache that holds both.
bool interleaved(const TensorView& a, const TensorView& b);

}  // namespace umfa
