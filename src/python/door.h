// What every file of the Python door shares: DLPack objects to TensorViews, options to requests.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>
#include <tuple>

#include "core/dlpack_view.h"
#include "core/error.h"
#include "core/problem.h"

namespace umfa::python {

namespace nb = nanobind;

/// Keeps an imported array alive for as long as its view is used.
template <class Array>
struct Imported {
    Array array;
    TensorView view;
};

template <class Array>
Imported<Array> import(nb::handle object, const std::string& function, const std::string& name) {
    Imported<Array> imported;
    if (!nb::try_cast<Array>(object, imported.array, false))
        fail(ErrorKind::type, function, name + " is not a readable DLPack tensor",
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

/// The options that every attention function takes, after the façade has normalised their types.
struct Options {
    std::string function;
    std::tuple<std::string, std::string, std::string> names;  // the caller's query, key, value
    Causal causal = Causal::none;
    std::optional<double> softmax_scale;
    int64_t window_left = -1, window_right = -1;
    double softcap = 0, dropout_p = 0;
    bool return_lse = false;
    std::string backend = "auto";
    Layout layout = Layout::bshd;
    bool broadcasts = false, grouped = true;
};

/// The request with its inputs attached; `inputs` owns what the views point to.
inline AttentionRequest make_request(const Options& options, nb::handle query, nb::handle key,
                                     nb::handle value, nb::handle alibi_slopes,
                                     nb::handle attn_mask, Input (&inputs)[5]) {
    AttentionRequest request;
    const auto& [query_name, key_name, value_name] = options.names;
    request.function = options.function;
    request.query_name = query_name;
    request.key_name = key_name;
    request.value_name = value_name;
    inputs[0] = import<nb::ndarray<nb::ro>>(query, options.function, query_name);
    inputs[1] = import<nb::ndarray<nb::ro>>(key, options.function, key_name);
    inputs[2] = import<nb::ndarray<nb::ro>>(value, options.function, value_name);
    request.query = inputs[0].view;
    request.key = inputs[1].view;
    request.value = inputs[2].view;
    if (!alibi_slopes.is_none()) {
        inputs[3] = import<nb::ndarray<nb::ro>>(alibi_slopes, options.function, "alibi_slopes");
        request.alibi_slopes = inputs[3].view;
    }
    if (!attn_mask.is_none()) {
        inputs[4] = import<nb::ndarray<nb::ro>>(attn_mask, options.function, "attn_mask");
        request.attn_mask = inputs[4].view;
    }
    request.layout = options.layout;
    request.broadcasts = options.broadcasts;
    request.grouped = options.grouped;
    request.causal = options.causal;
    request.softmax_scale = options.softmax_scale;
    request.window_left = options.window_left;
    request.window_right = options.window_right;
    request.softcap = options.softcap;
    request.dropout_p = options.dropout_p;
    request.wants_lse = options.return_lse;
    return request;
}

/// Adds what the benchmark measures below Python.
void bind_measure(nb::module_& m);

/// Adds what tests and other executors need of the Metal planner.
void bind_metal_plan(nb::module_& m);

}  // namespace umfa::python
