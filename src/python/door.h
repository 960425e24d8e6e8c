// What every file of the Python door shares: DLPack objects to TensorViews, options to requests.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

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
    int64_t attention_chunk = 0;
    std::optional<int64_t> max_seqlen_q, max_seqlen_k;
    std::string lengths_name = "seqused_k";  // the caller's spelling
    bool rotary_interleaved = true;
    int64_t num_splits = 0;
    uint64_t dropout_seed = 0, dropout_offset = 0;
};

/// Keeps what a request's views point to.
struct Inputs {
    Input query, key, value, alibi_slopes, attn_mask;
    std::vector<Input> others;
    Output key_cache, value_cache;  // where they are written to
};

/// Attaches the tensors of `others` to the request.
inline void read_others(const Options& options, const nb::dict& others, Inputs& inputs,
                        AttentionRequest& request) {
    struct Place {
        std::string_view name;
        std::optional<TensorView>& view;
    } places[] = {{"learnable_sink", request.sinks},
                  {"qv", request.qv},
                  {"cu_seqlens_q", request.tables.cu_seqlens_q},
                  {"cu_seqlens_k", request.tables.cu_seqlens_k},
                  {"seqused_q", request.tables.seqused_q},
                  {"seqused_k", request.tables.seqused_k},
                  {"cache_batch_idx", request.tables.cache_batch_idx},
                  {"cache_leftpad", request.tables.cache_leftpad},
                  {"block_table", request.tables.block_table},
                  {"new_key", request.new_key},
                  {"new_value", request.new_value},
                  {"rotary_cos", request.rotary_cos},
                  {"rotary_sin", request.rotary_sin}};
    for (const auto& [key, tensor] : others) {
        const std::string name = nb::cast<std::string>(key);
        bool known = false;
        for (Place& place : places) {
            if (place.name != name) continue;
            const std::string shown = name == "new_key"     ? "k"
                                      : name == "new_value" ? "v"
                                      : name == "seqused_k" ? options.lengths_name
                                                            : name;
            inputs.others.push_back(import<nb::ndarray<nb::ro>>(tensor, options.function, shown));
            place.view = inputs.others.back().view;
            known = true;
        }
        if (!known)
            fail(ErrorKind::internal, options.function, "a tensor has no place", name,
                 "a name of AttentionRequest");
    }
}

/// The request with its inputs attached; `inputs` owns what the views point to. `others`: a dict of
/// the tensors that few calls have, by their name in AttentionRequest or SequenceTables; or None.
inline AttentionRequest make_request(const Options& options, nb::handle query, nb::handle key,
                                     nb::handle value, nb::handle alibi_slopes,
                                     nb::handle attn_mask, nb::handle others, Inputs& inputs) {
    AttentionRequest request;
    const auto& [query_name, key_name, value_name] = options.names;
    request.function = options.function;
    request.query_name = query_name;
    request.key_name = key_name;
    request.value_name = value_name;
    inputs.query = import<nb::ndarray<nb::ro>>(query, options.function, query_name);
    request.query = inputs.query.view;
    if (!others.is_none()) read_others(options, nb::cast<nb::dict>(others), inputs, request);
    if (request.new_key || request.new_value) {  // they are written to; a capsule opens only once
        inputs.key_cache = import<nb::ndarray<>>(key, options.function, key_name);
        inputs.value_cache = import<nb::ndarray<>>(value, options.function, value_name);
        request.key = inputs.key_cache.view;
        request.value = inputs.value_cache.view;
    } else {
        inputs.key = import<nb::ndarray<nb::ro>>(key, options.function, key_name);
        inputs.value = import<nb::ndarray<nb::ro>>(value, options.function, value_name);
        request.key = inputs.key.view;
        request.value = inputs.value.view;
    }
    if (!alibi_slopes.is_none()) {
        inputs.alibi_slopes =
            import<nb::ndarray<nb::ro>>(alibi_slopes, options.function, "alibi_slopes");
        request.alibi_slopes = inputs.alibi_slopes.view;
    }
    if (!attn_mask.is_none()) {
        inputs.attn_mask = import<nb::ndarray<nb::ro>>(attn_mask, options.function, "attn_mask");
        request.attn_mask = inputs.attn_mask.view;
    }
    request.layout = options.layout;
    request.broadcasts = options.broadcasts;
    if (options.broadcasts) request.scale_name = "scale";  // as torch has it
    request.grouped = options.grouped;
    request.causal = options.causal;
    request.softmax_scale = options.softmax_scale;
    request.window_left = options.window_left;
    request.window_right = options.window_right;
    request.softcap = options.softcap;
    request.dropout_p = options.dropout_p;
    request.wants_lse = options.return_lse;
    request.attention_chunk = options.attention_chunk;
    request.tables.max_seqlen_q = options.max_seqlen_q;
    request.tables.max_seqlen_k = options.max_seqlen_k;
    request.tables.seqused_k_name = options.lengths_name;
    request.tables.key_name = key_name;
    request.rotary_interleaved = options.rotary_interleaved;
    request.num_splits = options.num_splits;
    request.dropout_seed = options.dropout_seed;
    request.dropout_offset = options.dropout_offset;
    return request;
}

/// Adds what the benchmark measures below Python.
void bind_measure(nb::module_& m);

/// Adds what tests and other executors need of the Metal planner.
void bind_metal_plan(nb::module_& m);

}  // namespace umfa::python
