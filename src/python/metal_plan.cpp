// LaunchPlans as Python values, for the executors that are written in Python.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "core/instruments.h"
#include "core/problem.h"
#include "python/backward.h"
#include "python/player.h"
#include "python/record.h"

namespace umfa::python {
namespace {

using namespace nb::literals;
using namespace umfa::metal;

nb::tuple size_tuple(const Size3& size) { return nb::make_tuple(size.x, size.y, size.z); }

const char* name_of(Binding::Kind kind) {
    switch (kind) {
        case Binding::Kind::tensor: return "tensor";
        case Binding::Kind::scratch: return "scratch";
        case Binding::Kind::data: return "data";
    }
    return "unknown";
}

nb::dict launch_dict(const KernelLaunch& launch) {
    nb::dict macros, constants, result;
    for (const auto& [name, text] : launch.macros) macros[name.c_str()] = text;
    for (const Constant& constant : launch.constants) {
        if (constant.type == Constant::Type::boolean)
            constants[nb::int_(constant.index)] = constant.value != 0;
        else
            constants[nb::int_(constant.index)] = constant.value;
    }
    nb::list buffers;
    for (const Binding& binding : launch.buffers)
        buffers.append(nb::make_tuple(binding.index, name_of(binding.kind), binding.piece,
                                      binding.byte_offset));
    result["kernel"] = launch.kernel;
    result["source"] = launch.source;
    result["macros"] = macros;
    result["defines"] = kernel_defines(launch);
    result["constants"] = constants;
    result["constant_defines"] = constant_defines(launch);
    result["buffers"] = buffers;
    result["buffer_count"] = launch.buffer_count;
    result["params_index"] = launch.params_index;
    result["params"] =
        nb::bytes(reinterpret_cast<const char*>(launch.params.data()), launch.params.size());
    result["grid"] = size_tuple(launch.grid);
    result["threadgroup"] = size_tuple(launch.threadgroup);
    result["threadgroup_bytes"] = launch.threadgroup_bytes;
    result["families"] = families_of(launch);
    result["origin"] = size_tuple(launch.origin);
    result["further_slice"] = launch.further_slice;
    result["seconds"] = launch.seconds;
    return result;
}

}  // namespace

nb::dict plan_dict(const LaunchPlan& plan) {
    nb::list tensors, described, offsets, launches, scratch, data;
    for (const PlanTensor& tensor : plan.tensors) {
        tensors.append(nb::make_tuple(tensor.name, tensor.written));
        described.append(
            nb::make_tuple(tensor.name, shape_tuple(tensor.view), name_of(tensor.view.dtype)));
        offsets.append(tensor.view.byte_offset);
    }
    for (const KernelLaunch& launch : plan.launches) launches.append(launch_dict(launch));
    for (const uint64_t bytes : plan.scratch_bytes) scratch.append(bytes);
    for (const std::vector<std::byte>& piece : plan.data)
        data.append(nb::bytes(reinterpret_cast<const char*>(piece.data()), piece.size()));
    nb::dict result;
    result["tensors"] = tensors;
    result["described"] = described;
    result["byte_offsets"] = offsets;
    result["launches"] = launches;
    result["scratch_bytes"] = scratch;
    result["data"] = data;
    result["sequence_bytes"] = sequence_bytes();
    return result;
}

namespace {

nb::dict metal_plan_forward(const Options& options, int family, int cores, const nb::tuple& tensors,
                            nb::handle out, nb::handle lse, const std::vector<std::string>& tiles,
                            bool by_tables) {
    const std::string& function = options.function->name;
    Inputs inputs;
    AttentionRequest request = make_request(options, tensors, inputs);
    const Output out_array = import_output(out, function, "out");
    request.out = out_array.view;  // the problem takes its dtype
    request.tables_in_stream = by_tables && request.has_tables();
    const Problem problem = Problem::make(request);
    Output lse_array;
    std::optional<TensorView> lse_view;
    if (!lse.is_none()) {
        lse_array = import_output(lse, function, "softmax_lse");
        lse_view = lse_array.view;
    }
    return plan_dict(
        plan(problem, problem.results(out_array.view, lse_view), family, cores, tiles));
}

nb::dict metal_plan_backward(const Options& options, int family, int cores,
                             const nb::tuple& tensors, const nb::tuple& saved,
                             const std::vector<std::pair<std::string, nb::object>>& gradients) {
    BackwardTensors kept;
    std::vector<std::string> wanted;
    for (const auto& [name, array] : gradients) wanted.push_back(name);
    const BackwardProblem problem = make_backward(options, tensors, saved, wanted, kept);
    std::vector<Output> outputs;
    outputs.reserve(gradients.size());
    Gradients views;
    for (const auto& [name, array] : gradients) {
        outputs.push_back(import_output(array, options.function->name, name));
        views[static_cast<size_t>(*gradient_named(name))] = outputs.back().view;
    }
    return plan_dict(plan(problem, problem.results(views), family, cores));
}

nb::dict metal_plan_combine(int family, int cores, nb::handle out_partial, nb::handle lse_partial,
                            nb::handle out, nb::handle lse) {
    const std::string function = "umfa._ext.metal_plan_combine";
    const Input from = import_input(out_partial, function, "out_partial");
    const Input from_lse = import_input(lse_partial, function, "lse_partial");
    const Output to = import_output(out, function, "out");
    const Output to_lse = import_output(lse, function, "softmax_lse");
    const CombineProblem problem =
        CombineProblem::make({function, from.view, from_lse.view, {}, to.view});
    return plan_dict(plan(problem, problem.results(to.view, to_lse.view), family, cores));
}

}  // namespace

void bind_metal_plan(nb::module_& m) {
    m.def("metal_plan_forward", &metal_plan_forward, "options"_a, "family"_a, "cores"_a,
          "tensors"_a, "out"_a, "lse"_a.none(), "tiles"_a = std::vector<std::string>(),
          "by_tables"_a = false,
          nb::sig("def metal_plan_forward(options: Options, family: int, cores: int, "
                  "tensors: tuple[object, ...], out: object, lse: object | None, "
                  "tiles: list[str] = [], by_tables: bool = False) -> dict[str, typing.Any]"),
          "The LaunchPlan of a forward pass on an Apple GPU family (7 to 10), as plain values.\n"
          "`by_tables`: a kernel reads the tables of sequences.");
    m.def(
        "table_fields",
        [] {
            std::vector<std::string> names;
            for (const TensorField& field : tensor_fields)
                if (field.table) names.push_back(name_of(field.field));
            return names;
        },
        nb::sig("def table_fields() -> list[str]"),
        "The tables of sequences, in the order in which that kernel counts them.");
    m.def("metal_plan_backward", &metal_plan_backward, "options"_a, "family"_a, "cores"_a,
          "tensors"_a, "saved"_a, "gradients"_a,
          nb::sig("def metal_plan_backward(options: Options, family: int, cores: int, "
                  "tensors: tuple[object, ...], "
                  "saved: tuple[object, object, object, object | None], "
                  "gradients: collections.abc.Sequence[tuple[str, object]]) "
                  "-> dict[str, typing.Any]"),
          "Likewise of a backward pass: `saved` as attention_backward() takes it, and the tensors "
          "to\n"
          "write by their names.");
    m.def("metal_plan_combine", &metal_plan_combine, "family"_a, "cores"_a, "out_partial"_a,
          "lse_partial"_a, "out"_a, "lse"_a,
          nb::sig("def metal_plan_combine(family: int, cores: int, out_partial: object, "
                  "lse_partial: object, out: object, lse: object) -> dict[str, typing.Any]"),
          "Likewise of merging partial results.");
}

}  // namespace umfa::python
