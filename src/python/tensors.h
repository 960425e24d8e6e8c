// DLPack objects to TensorViews.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "core/dlpack_view.h"
#include "core/error.h"
#include "core/tensor_view.h"
#include "python/exchange.h"

namespace umfa::python {

namespace nb = nanobind;

/// Keeps an imported array alive for as long as its view is used. Of an object with the exchange API
/// nothing is kept: the caller's reference is.
template <class Array>
struct Imported {
    Array array;
    TensorView view;
};

template <class Array>
Imported<Array> import(nb::handle object, const std::string& function, const std::string& name) {
    Imported<Array> imported;
    if (const ExchangeApi* api = exchange_api(object)) {
        DLTensor tensor{};
        if (api->describe(object.ptr(), &tensor) != 0) throw nb::python_error();
        imported.view = view_of(tensor, function, name);
        return imported;
    }
    if (!nb::try_cast<Array>(object, imported.array, false))
        fail(ErrorKind::type, function,
             name + " is not a " + (Array::ReadOnly ? "readable" : "writable") + " DLPack tensor",
             PyCapsule_CheckExact(object.ptr()) ? "a DLPack capsule with an impossible tensor"
                                                : nb::type_name(object.type()).c_str(),
             "a tensor of torch, numpy, jax, mlx or any DLPack library");
    const Array& array = imported.array;
    int64_t shape[TensorView::max_ndim], strides[TensorView::max_ndim];
    DLTensor tensor{};
    tensor.ndim = static_cast<int32_t>(array.ndim());
    for (size_t i = 0; i < array.ndim() && i < TensorView::max_ndim; ++i) {
        shape[i] = static_cast<int64_t>(array.shape(i));
        strides[i] = array.stride(i);
    }
    tensor.data = const_cast<void*>(static_cast<const void*>(array.data_handle()));
    tensor.byte_offset = array.byte_offset();
    tensor.device = {static_cast<DLDeviceType>(array.device_type()), array.device_id()};
    tensor.dtype = {array.dtype().code, array.dtype().bits, array.dtype().lanes};
    tensor.shape = shape;
    tensor.strides = strides;
    imported.view = view_of(tensor, function, name);
    return imported;
}

using Input = Imported<nb::ndarray<nb::ro>>;
using Output = Imported<nb::ndarray<>>;

inline Input import_input(nb::handle object, const std::string& function, const std::string& name) {
    return import<nb::ndarray<nb::ro>>(object, function, name);
}
inline Output import_output(nb::handle object, const std::string& function,
                            const std::string& name) {
    return import<nb::ndarray<>>(object, function, name);
}

}  // namespace umfa::python
