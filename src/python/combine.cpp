// Merging partial results, and asking whether they could be merged.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "core/dispatch.h"
#include "python/player.h"
#include "python/record.h"
#include "python/running.h"
#include "python/values.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

/// The call's tensors, kept for as long as their views are used.
struct Tensors {
    Input out_partial, lse_partial;
    Output out;
};

CombineProblem make_problem(const std::string& function, nb::handle out_partial,
                            nb::handle lse_partial, nb::handle out, nb::handle out_dtype,
                            Tensors& tensors) {
    tensors.out_partial = import_input(out_partial, function, "out_partial");
    tensors.lse_partial = import_input(lse_partial, function, "lse_partial");
    CombineRequest request{function, tensors.out_partial.view, tensors.lse_partial.view, {}, {}};
    static const std::string name = "out_dtype";
    request.out_dtype = dtype({function, name}, out_dtype);
    if (!out.is_none()) {
        tensors.out = import_output(out, function, "out");
        request.out = tensors.out.view;
    }
    return CombineProblem::make(request);
}

nb::tuple combine_parts(const std::string& function, nb::handle out_partial, nb::handle lse_partial,
                        nb::handle out, nb::handle out_dtype, const std::string& backend_name,
                        nb::callable allocate, nb::handle play) {
    Tensors tensors;
    const CombineProblem problem =
        make_problem(function, out_partial, lse_partial, out, out_dtype, tensors);
    const Backend& backend = routed(problem, backend_name);
    nb::object merged = nb::none();
    if (out.is_none()) {
        merged = allocate(shape_tuple(problem.out_shape()), name_of(problem.out_dtype));
        tensors.out = import_output(merged[0], function, "out");
        merged = merged[1];
    }
    nb::object lse = allocate(shape_tuple(problem.lse_shape()), name_of(DType::f32));
    const Output lse_array = import_output(lse[0], function, "softmax_lse");
    const CombineResults results = problem.results(tensors.out.view, lse_array.view);
    if (play.is_none()) {
        without_gil([&] { combine(backend, problem, results); });
    } else {
        PythonPlayer player(play);
        combine(backend, problem, results, player);
    }
    return nb::make_tuple(merged, nb::object(lse[1]));
}

std::pair<bool, std::string> combine_can_run(const std::string& function, nb::handle out_partial,
                                             nb::handle lse_partial, nb::handle out,
                                             nb::handle out_dtype,
                                             const std::string& backend_name) {
    Tensors tensors;
    const Verdict verdict = judged(
        make_problem(function, out_partial, lse_partial, out, out_dtype, tensors), backend_name);
    return {verdict.yes, verdict.reason};
}

nb::tuple combine_warm_up(const std::string& function, nb::handle out_partial,
                          nb::handle lse_partial, nb::handle out, nb::handle out_dtype,
                          const std::string& backend_name, nb::handle play) {
    Tensors tensors;
    const CombineProblem problem =
        make_problem(function, out_partial, lse_partial, out, out_dtype, tensors);
    if (play.is_none()) return warmed_up([&] { return warm_up(problem, backend_name); });
    routed(problem, backend_name);  // the self-test may have to run, without the GIL
    PythonPlayer player(play);
    return nb::make_tuple(warm_up(problem, backend_name, player), 0, 0);
}

}  // namespace

void bind_combine(nb::module_& m) {
    m.def("combine", &combine_parts, "function"_a, "out_partial"_a, "lse_partial"_a, "out"_a.none(),
          "out_dtype"_a.none(), "backend"_a, "allocate"_a, "play"_a.none() = nb::none(),
          nb::sig("def combine(function: str, out_partial: object, lse_partial: object, "
                  "out: object | None, out_dtype: object | None, backend: str, "
                  "allocate: collections.abc.Callable[[tuple[int, ...], str], "
                  "tuple[object, object]], "
                  "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None "
                  "= None) -> tuple[object | None, object]"),
          "Merges partial results of attention, DLPack tensors.\n\n"
          "`allocate(shape, dtype)` returns (DLPack tensor to write, what to hand back).\n"
          "`play`: as of attention_forward.\n"
          "Returns (out, lse) as allocate handed them back; None for an `out` that was given.");
    m.def(
        "combine_can_run", &combine_can_run, "function"_a, "out_partial"_a, "lse_partial"_a,
        "out"_a.none(), "out_dtype"_a.none(), "backend"_a,
        nb::sig("def combine_can_run(function: str, out_partial: object, lse_partial: object, "
                "out: object | None, out_dtype: object | None, backend: str) -> tuple[bool, str]"),
        "The routing's verdict on the same call, and its reason.");
    m.def("combine_warm_up", &combine_warm_up, "function"_a, "out_partial"_a, "lse_partial"_a,
          "out"_a.none(), "out_dtype"_a.none(), "backend"_a, "play"_a.none() = nb::none(),
          nb::sig("def combine_warm_up(function: str, out_partial: object, lse_partial: object, "
                  "out: object | None, out_dtype: object | None, backend: str, "
                  "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None "
                  "= None) -> tuple[str, int, int]"),
          "Compiles the kernels of the same call: (backend, kernels used, kernels built now).");
}

}  // namespace umfa::python
