// Running one attention call, and asking whether it could be run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "core/dispatch.h"
#include "core/weights.h"
#include "python/player.h"
#include "python/record.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

bool has_device_table(const AttentionRequest& request) {
    return std::ranges::any_of(tensor_fields, [&](const TensorField& field) {
        const std::optional<TensorView>& view = request.*field.view;
        return field.table && view && view->device != Device::cpu;
    });
}

nb::tuple attention_forward(const Options& options, const nb::tuple& tensors,
                            nb::callable framework_allocate, nb::handle like, nb::handle wish,
                            nb::handle play) {
    const auto allocate = [&](const TensorView& shape, DType dtype) -> nb::object {
        return framework_allocate(like, shape_tuple(shape), name_of(dtype), wish);
    };
    Inputs inputs;
    AttentionRequest request = make_request(options, tensors, inputs);
    request.tables_in_stream = !play.is_none() && has_device_table(request);
    const Problem problem = Problem::make(request);
    const bool wants_weights = options.returns_weights();
    if (wants_weights) check_weights(problem);
    const Backend& backend = wants_weights ? routed(weights_steps(problem, true), options.backend)
                                           : routed_call(problem, options.backend);
    const std::string& function = options.function->name;

    // The façade allocates in the caller's framework, now that the shapes are known to be right.
    nb::object out = nb::none(), lse = nb::none();
    Output out_array, lse_array;
    if (!request.out) {
        out = allocate(problem.out_shape(), problem.out_dtype);
        out_array = import_output(out[0], function, "out");
        out = out[1];
    }
    std::optional<TensorView> lse_view;
    if (problem.wants_lse) {
        lse = allocate(problem.lse_shape(), DType::f32);
        lse_array = import_output(lse[0], function, "softmax_lse");
        lse_view = lse_array.view;
    }
    const ForwardResults results =
        problem.results(request.out ? *request.out : out_array.view, lse_view);
    nb::object matrix = nb::none();
    Output matrix_array;
    if (wants_weights) {
        matrix = allocate(weights_shape(problem), problem.query.view.dtype);
        matrix_array = import_output(matrix[0], function, "weights");
    }
    if (play.is_none() || wants_weights) {
        without_gil([&] {
            forward(backend, problem, results);
            if (wants_weights) weights(backend, problem, matrix_array.view);
        });
    } else {
        PythonPlayer player(play);
        forward(backend, problem, results, player);
    }
    const auto handed_back = [](const nb::object& allocated) {
        return allocated.is_none() ? allocated : nb::object(allocated[1]);
    };
    return nb::make_tuple(out, handed_back(lse), handed_back(matrix));
}

std::pair<bool, std::string> attention_can_run(const Options& options, const nb::tuple& tensors) {
    Inputs inputs;
    const Problem problem = Problem::make(make_request(options, tensors, inputs));
    Verdict verdict;
    if (options.returns_weights()) {
        check_weights(problem);
        verdict = judged(weights_steps(problem, true), options.backend);
    } else {
        verdict = judged(problem, options.backend);
    }
    return {verdict.yes, verdict.reason};
}

nb::tuple attention_warm_up(const Options& options, const nb::tuple& tensors, nb::handle play) {
    Inputs inputs;
    AttentionRequest request = make_request(options, tensors, inputs);
    request.tables_in_stream = !play.is_none() && has_device_table(request);
    const Problem problem = Problem::make(request);
    const ForwardResults results = problem.results_without_memory(request.out);
    if (play.is_none())
        return warmed_up([&] { return warm_up(problem, options.backend, results); });
    routed(problem, options.backend);  // the self-test may have to run, without the GIL
    PythonPlayer player(play);
    return nb::make_tuple(warm_up(problem, options.backend, results, player), 0, 0);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def(
        "attention_forward", &attention_forward, "options"_a, "tensors"_a, "allocate"_a, "like"_a,
        "backend"_a, "play"_a.none() = nb::none(),
        nb::sig("def attention_forward(options: Options, tensors: tuple[object, ...], "
                "allocate: collections.abc.Callable[[object, tuple[int, ...], str, str], "
                "tuple[object, object]], like: object, backend: str, "
                "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None "
                "= None) "
                "-> tuple[object | None, object | None, object | None]"),
        "Computes attention on DLPack tensors, in the order of options.names.\n\n"
        "`allocate(like, shape, dtype, backend)` returns (DLPack tensor to write, what to hand\n"
        "back); `like` and `backend` are passed on to it.\n"
        "Returns (out, lse or None, weights or None) as allocate handed them back; out is None\n"
        "if it was given. The weights are those of return_attn_probs with dropout.\n\n"
        "`play(plan)` queues a Metal plan in another library's stream: None if it did; the most\n"
        "threads of a threadgroup that the kernels take, if that is too few for the plan; 0 if "
        "the\n"
        "stream cannot take it, and has nothing left to do. Then umfa's own queue runs it.\n"
        "With it, tables may lie where the query does: a kernel of the plan reads them, and notes\n"
        "in the tensor table_fault what was out of range. The queue runs no such plan.");
    m.def("attention_can_run", &attention_can_run, "options"_a, "tensors"_a,
          nb::sig("def attention_can_run(options: Options, tensors: tuple[object, ...]) "
                  "-> tuple[bool, str]"),
          "The routing's verdict on the same call, and its reason.");
    m.def("attention_warm_up", &attention_warm_up, "options"_a, "tensors"_a,
          "play"_a.none() = nb::none(),
          nb::sig("def attention_warm_up(options: Options, tensors: tuple[object, ...], "
                  "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None "
                  "= None) -> tuple[str, int, int]"),
          "Compiles the kernels of the same call: (backend, kernels used, kernels built now).\n\n"
          "With `play`, which compiles those of each plan that it is given, the numbers are 0.");
}

}  // namespace umfa::python
