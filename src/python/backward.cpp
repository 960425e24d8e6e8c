// The backward pass of one attention call, and asking whether it could be run.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "core/dispatch.h"
#include "python/backward.h"
#include "python/player.h"
#include "python/record.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;
using Names = std::vector<std::string>;

}  // namespace

BackwardProblem make_backward(const Options& options, const nb::tuple& tensors,
                              const nb::tuple& saved, const Names& wanted, BackwardTensors& kept) {
    const std::string& function = options.function->name;
    BackwardRequest request(make_request(options, tensors, kept.attention));
    static constexpr const char* names[] = {"out", "lse", "dout", "dlse"};
    std::optional<TensorView>* views[] = {&request.out, &request.lse, &request.dout, &request.dlse};
    if (nb::len(saved) != std::size(names))
        fail(ErrorKind::type, function, "saved has the wrong length",
             std::to_string(nb::len(saved)), "4: (out, lse, dout, dlse or None)");
    for (size_t i = 0; i < std::size(names); ++i) {
        if (saved[i].is_none()) continue;
        kept.saved[i] = import_input(saved[i], function, names[i]);
        *views[i] = kept.saved[i].view;
    }
    for (const std::string& name : wanted) {
        const std::optional<Gradient> gradient = gradient_named(name);
        if (!gradient)
            fail(ErrorKind::value, function, "there is no such gradient", "'" + name + "'",
                 "dq, dk, dv, dqv, dmask, dsinks or dalibi_slopes");
        if (request.wanted & bit(*gradient))
            fail(ErrorKind::value, function, "a gradient is wanted twice", "'" + name + "'",
                 "each name once");
        request.wanted |= bit(*gradient);
    }
    return BackwardProblem::make(request);
}

namespace {

nb::tuple attention_backward(const Options& options, const nb::tuple& tensors,
                             const nb::tuple& saved, const Names& wanted, nb::callable allocate,
                             bool float32, nb::handle play) {
    BackwardTensors kept;
    const BackwardProblem problem = make_backward(options, tensors, saved, wanted, kept);
    const Backend& backend = routed(problem, options.backend);
    Gradients gradients;
    std::vector<Output> arrays;
    arrays.reserve(wanted.size());
    nb::list handed_back;
    for (const std::string& name : wanted) {
        const Gradient gradient = *gradient_named(name);
        const TensorView shape = problem.shape_of(gradient);
        const nb::object made =
            allocate(shape_tuple(shape), name_of(float32 ? DType::f32 : shape.dtype));
        arrays.push_back(import_output(made[0], options.function->name, name));
        gradients[static_cast<size_t>(gradient)] = arrays.back().view;
        handed_back.append(made[1]);
    }
    const BackwardResults results = problem.results(gradients);
    if (play.is_none()) {
        without_gil([&] { backward(backend, problem, results); });
    } else {
        PythonPlayer player(play);
        backward(backend, problem, results, player);
    }
    return nb::tuple(handed_back);
}

std::pair<bool, std::string> attention_backward_can_run(const Options& options,
                                                        const nb::tuple& tensors,
                                                        const nb::tuple& saved,
                                                        const Names& wanted) {
    BackwardTensors kept;
    const Verdict verdict =
        judged(make_backward(options, tensors, saved, wanted, kept), options.backend);
    return {verdict.yes, verdict.reason};
}

}  // namespace

void bind_backward(nb::module_& m) {
    m.def(
        "attention_backward", &attention_backward, "options"_a, "tensors"_a, "saved"_a, "wanted"_a,
        "allocate"_a, "float32"_a = false, "play"_a.none() = nb::none(),
        nb::sig(
            "def attention_backward(options: Options, tensors: tuple[object, ...], "
            "saved: tuple[object, object, object, object | None], "
            "wanted: collections.abc.Sequence[str], "
            "allocate: collections.abc.Callable[[tuple[int, ...], str], "
            "tuple[object, object]], float32: bool = False, "
            "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None = None) "
            "-> tuple[object, ...]"),
        "Gradients of the attention call that options and tensors describe.\n\n"
        "`saved` is (out, lse, dout, dlse): the results of the call, the natural log-sum-exp in\n"
        "float32, and the gradients of both; None for a dlse of 0. `wanted` has names among dq,\n"
        "dk, dv, dqv, dmask, dsinks and dalibi_slopes.\n"
        "`allocate(shape, dtype)` returns (DLPack tensor to write, what to hand back). A gradient\n"
        "has the shape of its tensor, and its dtype, or with `float32` that.\n"
        "`play`: as of attention_forward.\n"
        "Returns what allocate handed back, in the order of `wanted`.");
    m.def("attention_backward_can_run", &attention_backward_can_run, "options"_a, "tensors"_a,
          "saved"_a, "wanted"_a,
          nb::sig("def attention_backward_can_run(options: Options, tensors: tuple[object, ...], "
                  "saved: tuple[object, object, object, object | None], "
                  "wanted: collections.abc.Sequence[str]) -> tuple[bool, str]"),
          "The routing's verdict on the same call, and its reason.");
}

}  // namespace umfa::python
