// Running one attention call, and asking whether it could be run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include "core/dispatch.h"
#include "core/weights.h"
#include "python/record.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

/// Whether the call returns its weights too: they are of use only to see what dropout has dropped.
bool returns_weights(const Options& options) {
    return options.values.return_attn_probs && options.values.dropout_p != 0;
}

nb::tuple attention_forward(const Options& options, const nb::tuple& tensors,
                            nb::callable allocate) {
    Inputs inputs;
    const AttentionRequest request = make_request(options, tensors, inputs);
    const Problem problem = Problem::make(request);
    const bool wants_weights = returns_weights(options);
    if (wants_weights) check_weights(problem);
    const Backend& backend = routed(problem, options.backend);
    const std::string& function = options.function->name;

    // The façade allocates in the caller's framework, now that the shapes are known to be right.
    nb::object out = nb::none(), lse = nb::none();
    Output out_array, lse_array;
    if (!request.out) {
        out = allocate(shape_tuple(problem.out_shape()), name_of(problem.out_dtype));
        out_array = import_output(out[0], function, "out");
        out = out[1];
    }
    std::optional<TensorView> lse_view;
    if (problem.wants_lse) {
        lse = allocate(shape_tuple(problem.lse_shape()), name_of(DType::f32));
        lse_array = import_output(lse[0], function, "softmax_lse");
        lse_view = lse_array.view;
    }
    const ForwardResults results =
        problem.results(request.out ? *request.out : out_array.view, lse_view);
    nb::object matrix = nb::none();
    Output matrix_array;
    if (wants_weights) {
        matrix = allocate(shape_tuple(weights_shape(problem)), name_of(problem.query.view.dtype));
        matrix_array = import_output(matrix[0], function, "weights");
    }
    without_gil([&] {
        forward(backend, problem, results);
        if (wants_weights) weights(backend, problem, matrix_array.view);
    });
    const auto handed_back = [](const nb::object& allocated) {
        return allocated.is_none() ? allocated : nb::object(allocated[1]);
    };
    return nb::make_tuple(out, handed_back(lse), handed_back(matrix));
}

std::pair<bool, std::string> attention_can_run(const Options& options, const nb::tuple& tensors) {
    Inputs inputs;
    const Problem problem = Problem::make(make_request(options, tensors, inputs));
    if (returns_weights(options)) check_weights(problem);
    const Verdict verdict = judged(problem, options.backend);
    return {verdict.yes, verdict.reason};
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention_forward", &attention_forward, "options"_a, "tensors"_a, "allocate"_a,
          nb::sig("def attention_forward(options: Options, tensors: tuple[object, ...], "
                  "allocate: collections.abc.Callable[[tuple[int, ...], str], "
                  "tuple[object, object]]) -> tuple[object | None, object | None, object | None]"),
          "Computes attention on DLPack tensors, in the order of options.names.\n\n"
          "`allocate(shape, dtype)` returns (DLPack tensor to write, what to hand back).\n"
          "Returns (out, lse or None, weights or None) as allocate handed them back; out is None\n"
          "if it was given. The weights are those of return_attn_probs with dropout.");
    m.def("attention_can_run", &attention_can_run, "options"_a, "tensors"_a,
          nb::sig("def attention_can_run(options: Options, tensors: tuple[object, ...]) "
                  "-> tuple[bool, str]"),
          "The routing's verdict on the same call, and its reason.");
}

}  // namespace umfa::python
