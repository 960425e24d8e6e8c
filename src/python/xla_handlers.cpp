// Attention and its backward pass as custom calls of XLA programs, which jax.jit makes. XLA calls the
// handlers from threads of its own, without the GIL: nothing here uses Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <new>

#include "core/dispatch.h"
#include "core/weights.h"
#include "python/running.h"
#include "python/xla_options.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

/// How many buffers come in and go out; throws `Error` if they are not so many.
void check_count(const xla::Buffers& buffers, size_t least, size_t most, const Options& options,
                 const char* what) {
    const auto count = static_cast<size_t>(buffers.size);
    if (count < least || count > most)
        fail(ErrorKind::internal, options.function->name, std::string("wrong number of ") + what,
             std::to_string(count), std::to_string(least) + " to " + std::to_string(most));
}

void compute_forward(const xla::CallFrame& frame) {
    const Options options = XlaAttributes(frame.attributes).options({});
    const std::string& function = options.function->name;
    check_count(frame.arguments, options.given.size(), options.given.size(), options, "arguments");
    const AttentionRequest request = make_request(options, frame.arguments.buffers);
    const Problem problem = Problem::make(request);
    const bool wants_weights = options.returns_weights();
    if (wants_weights) check_weights(problem);
    const size_t results = 1u + problem.wants_lse + wants_weights;
    check_count(frame.results, results, results, options, "results");
    const Backend& backend = wants_weights ? route(weights_steps(problem, true), options.backend)
                                           : route(problem, options.backend);
    xla::Buffer* const* written = frame.results.buffers;
    std::optional<TensorView> lse;
    if (problem.wants_lse) lse = view_of(*written[1], function, "softmax_lse");
    forward(backend, problem, problem.results(view_of(*written[0], function, "out"), lse));
    if (wants_weights)
        weights(backend, problem, view_of(*written[results - 1], function, "weights"));
}

void compute_backward(const xla::CallFrame& frame) {
    const XlaAttributes attributes(frame.attributes);
    const Options options = attributes.options({"gradients"});
    const std::string& function = options.function->name;
    const size_t given = options.given.size();
    check_count(frame.arguments, given + 3, given + 4, options, "arguments");
    xla::Buffer* const* arguments = frame.arguments.buffers;
    BackwardRequest request(make_request(options, arguments));
    arguments += given;
    request.out = view_of(*arguments[0], function, "out");
    request.lse = view_of(*arguments[1], function, "softmax_lse");
    request.dout = view_of(*arguments[2], function, "the gradient of out");
    if (static_cast<size_t>(frame.arguments.size) == given + 4)
        request.dlse = view_of(*arguments[3], function, "the gradient of softmax_lse");
    const std::vector<std::string> wanted = parts_of(attributes.text("gradients"));
    check_count(frame.results, wanted.size(), wanted.size(), options, "results");
    Gradients gradients;
    for (size_t i = 0; i < wanted.size(); ++i) {
        const std::optional<Gradient> gradient = gradient_named(wanted[i]);
        if (!gradient)
            fail(ErrorKind::internal, function, "there is no such gradient", wanted[i],
                 "names of gradients");
        request.wanted |= bit(*gradient);
        gradients[static_cast<size_t>(*gradient)] =
            view_of(*frame.results.buffers[i], function, wanted[i]);
    }
    const BackwardProblem problem = BackwardProblem::make(request);
    backward(route(problem, options.backend), problem, problem.results(gradients));
}

xla::Error* error_of(const xla::Api& api, const char* message, xla::ErrorCode code) {
    xla::ErrorCreateArguments arguments{sizeof(xla::ErrorCreateArguments), nullptr, message, code};
    return api.create_error(&arguments);
}

xla::ErrorCode code_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::value:
        case ErrorKind::type: return xla::ErrorCode::invalid_argument;
        case ErrorKind::unsupported: return xla::ErrorCode::unimplemented;
        case ErrorKind::memory: return xla::ErrorCode::resource_exhausted;
        case ErrorKind::device:
        case ErrorKind::internal: break;
    }
    return xla::ErrorCode::internal;
}

template <void (*compute)(const xla::CallFrame&)>
xla::Error* handler(xla::CallFrame* frame) {
    const xla::Extension* extension = frame->extension_start;
    if (extension != nullptr && extension->type == xla::ExtensionType::metadata) {
        xla::Metadata& own = *reinterpret_cast<const xla::MetadataExtension*>(extension)->metadata;
        // What is used here is the same in all minor versions; XLA refuses those that it finds old.
        const int minor = frame->api ? frame->api->api_version.minor_version : xla::first_api_minor;
        own.api_version = {sizeof(xla::ApiVersion), nullptr, xla::api_major, minor};
        own.traits = 0;
        return nullptr;
    }
    try {
        compute(*frame);
        return nullptr;
    } catch (const Error& error) {
        return error_of(*frame->api, error.what(), code_of(error.kind()));
    } catch (const std::bad_alloc& error) {
        return error_of(*frame->api, error.what(), xla::ErrorCode::resource_exhausted);
    } catch (const std::exception& error) {
        return error_of(*frame->api, error.what(), xla::ErrorCode::internal);
    }
}

/// (shape, dtype) of each result.
nb::tuple attention_results(const Options& options, const nb::tuple& tensors) {
    Inputs inputs;
    const Problem problem = Problem::make(make_request(options, tensors, inputs));
    if (options.returns_weights()) {
        check_weights(problem);
        routed(weights_steps(problem, true), options.backend);
    } else {
        routed(problem, options.backend);
    }
    nb::list results;
    const auto add = [&](const TensorView& view, DType dtype) {
        results.append(nb::make_tuple(shape_tuple(view), name_of(dtype)));
    };
    add(problem.out_shape(), problem.out_dtype);
    if (problem.wants_lse) add(problem.lse_shape(), DType::f32);
    if (options.returns_weights()) add(weights_shape(problem), problem.query.view.dtype);
    return nb::tuple(results);
}

}  // namespace

void bind_xla(nb::module_& m) {
    m.def(
        "xla_handlers",
        [] {
            nb::dict handlers;
            handlers["umfa.attention"] =
                nb::capsule(reinterpret_cast<void*>(&handler<compute_forward>));
            handlers["umfa.attention_backward"] =
                nb::capsule(reinterpret_cast<void*>(&handler<compute_backward>));
            return handlers;
        },
        nb::sig("def xla_handlers() -> dict[str, object]"),
        "Custom calls for XLA programs: capsules for jax.ffi.register_ffi_target.");
    m.def("attention_results", &attention_results, "options"_a, "tensors"_a,
          nb::sig("def attention_results(options: Options, tensors: tuple[object, ...]) "
                  "-> tuple[tuple[tuple[int, ...], str], ...]"),
          "(shape, dtype) of what attention_forward would return. Raises what it would.");
}

}  // namespace umfa::python
