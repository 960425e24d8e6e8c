// The typed record that Python's functions hand on: a function's description, and the arguments of
// one call. Its fields are those of core/options.def.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/request.h"
#include "python/tensors.h"

namespace umfa::python {

/// What of a call may be kept for the next one: everything but the tensors.
struct Options {
    std::shared_ptr<const Function> function;
    AttentionOptions values;
    std::string backend = "auto";
    std::vector<uint8_t> given;  // indices into tensor_fields: the tensors that the call has

    const std::string& spelled(uint8_t index) const {
        return (*function)[tensor_fields[index].field];
    }
    bool has(Field field) const;
    bool operator==(const Options& other) const;
    /// Whether the call returns its weights too: they are of use only to see what dropout has
    /// dropped.
    bool returns_weights() const { return values.return_attn_probs && values.dropout_p != 0; }
};

/// The arguments of one call.
struct Attention {
    Options options;
    nb::dict tensors;  // by the caller's names, in the order of options.given
};

/// Keeps what a request's views point to.
struct Inputs {
    std::vector<Input> read;
    std::vector<Output> written;
};

/// The request on `tensors`, DLPack objects in the order of options.given.
AttentionRequest make_request(const Options& options, const nb::tuple& tensors, Inputs& inputs);

void bind_record(nb::module_& m);
/// Running a call, and asking whether it could be run.
void bind_attention(nb::module_& m);
/// The same of a backward pass.
void bind_backward(nb::module_& m);
/// The same of merging partial results.
void bind_combine(nb::module_& m);
/// Quantising and dequantising.
void bind_quantize(nb::module_& m);
/// Memory for frameworks whose own arrays cannot be written in place.
void bind_memory(nb::module_& m);
/// Calls from the programs that JAX compiles.
void bind_xla(nb::module_& m);
/// What the benchmark measures below Python.
void bind_measure(nb::module_& m);
/// What tests and other executors need of the Metal planner.
void bind_metal_plan(nb::module_& m);

}  // namespace umfa::python
