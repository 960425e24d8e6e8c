// Running one attention call, and asking whether it could be run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include "core/dispatch.h"
#include "python/record.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

nb::tuple attention_forward(const Options& options, const nb::tuple& tensors,
                            nb::callable allocate) {
    Inputs inputs;
    Problem problem = Problem::make(make_request(options, tensors, inputs));
    const Backend& backend = route(problem, options.backend);
    const std::string& function = options.function->name;

    // The façade allocates in the caller's framework, now that the shapes are known to be right.
    nb::object out = nb::none(), lse = nb::none();
    Output out_array, lse_array;
    if (!problem.out) {
        out = allocate(shape_tuple(problem.out_shape()), name_of(problem.query.view.dtype));
        out_array = import_output(out[0], function, "out");
        problem.set_out(out_array.view);
        out = out[1];
    }
    if (options.values.return_lse || options.values.return_attn_probs) {
        lse = allocate(shape_tuple(problem.lse_shape()), name_of(DType::f32));
        lse_array = import_output(lse[0], function, "softmax_lse");
        problem.set_lse(lse_array.view);
    }
    without_gil([&] { forward(backend, problem); });
    return nb::make_tuple(out, lse.is_none() ? nb::object(lse) : nb::object(lse[1]));
}

std::pair<bool, std::string> attention_can_run(const Options& options, const nb::tuple& tensors) {
    Inputs inputs;
    const Verdict verdict =
        can_run(Problem::make(make_request(options, tensors, inputs)), options.backend);
    return {verdict.yes, verdict.reason};
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention_forward", &attention_forward, "options"_a, "tensors"_a, "allocate"_a,
          nb::sig("def attention_forward(options: Options, tensors: tuple[object, ...], "
                  "allocate: collections.abc.Callable[[tuple[int, ...], str], "
                  "tuple[object, object]]) -> tuple[object | None, object | None]"),
          "Computes attention on DLPack tensors, in the order of options.names.\n\n"
          "`allocate(shape, dtype)` returns (DLPack tensor to write, what to hand back).\n"
          "Returns (out, lse or None) as allocate handed them back; out is None if it was given.");
    m.def("attention_can_run", &attention_can_run, "options"_a, "tensors"_a,
          nb::sig("def attention_can_run(options: Options, tensors: tuple[object, ...]) "
                  "-> tuple[bool, str]"),
          "The routing's verdict on the same call, and its reason.");
}

}  // namespace umfa::python
