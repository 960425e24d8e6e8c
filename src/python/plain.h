// Arrays of NumPy and torch as the core takes them, without a call of Python for each: what most of a
// tiny call's time went into.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "core/tensor_view.h"
#include "umfa/dlpack.h"

namespace umfa::python {

namespace nb = nanobind;

/// A DLTensor, and what it may point to.
struct PlainTensor {
    DLTensor tensor{};
    int64_t strides[TensorView::max_ndim];
    nb::object owner;
};

/// What is known of one framework. The GIL is held.
class PlainArrays {
public:
    virtual ~PlainArrays() = default;

    /// Whether a call on arrays of exactly this type is nothing but its work now: nobody
    /// differentiates, records, transforms or casts it. False also for what only Python can tell.
    virtual bool ready(const nb::handle (&arrays)[3], const std::string& backend) const = 0;

    /// Describes an array whose memory on the CPU holds its values. False for any other, and for what
    /// Python has to refuse.
    virtual bool describe(nb::handle array, PlainTensor& plain) const = 0;

    /// Memory for a result, which `written` will describe; for `finish`. `like` is an input, which
    /// `described` describes. Null for what only Python can allocate.
    virtual nb::object allocate(nb::handle like, const DLTensor& described, const TensorView& shape,
                                PlainTensor& written) const = 0;

    /// The array, once its memory has been written.
    virtual nb::object finish(nb::object allocated) const { return allocated; }
};

/// The framework of arrays of exactly this type; null if none has registered.
const PlainArrays* plain_arrays(nb::handle type);

/// Lets a framework's module register the type.
void bind_plain(nb::module_& m);
/// Calls with options of earlier ones.
void bind_repeated(nb::module_& m);
/// Kernels for torch's dispatcher that a flag switches.
void bind_switched(nb::module_& m);

}  // namespace umfa::python
