// LaunchPlans as Python values, for the executors that are written in Python.
#include "metal/plan_forward.h"

#include <nanobind/stl/string.h>

#include "metal/kernel_text.h"
#include "python/record.h"

namespace umfa::python {
namespace {

using namespace nb::literals;
using namespace umfa::metal;

nb::tuple size_tuple(const Size3& size) { return nb::make_tuple(size.x, size.y, size.z); }

const char* source_name(Binding::Source source) {
    switch (source) {
        case Binding::Source::query: return "query";
        case Binding::Source::key: return "key";
        case Binding::Source::value: return "value";
        case Binding::Source::out: return "out";
        case Binding::Source::lse: return "lse";
        case Binding::Source::mask: return "mask";
        case Binding::Source::alibi_slopes: return "alibi_slopes";
        case Binding::Source::sinks: return "learnable_sink";
        case Binding::Source::rotary_cos: return "rotary_cos";
        case Binding::Source::rotary_sin: return "rotary_sin";
        case Binding::Source::new_key: return "new_key";
        case Binding::Source::new_value: return "new_value";
        case Binding::Source::qv: return "qv";
        case Binding::Source::scratch: return "scratch";
        case Binding::Source::data: return "data";
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
        buffers.append(nb::make_tuple(binding.index, source_name(binding.source), binding.piece,
                                      binding.byte_offset));
    result["kernel"] = launch.kernel;
    result["source"] = launch.source;
    result["macros"] = macros;
    result["defines"] = kernel_defines(launch);
    result["constants"] = constants;
    result["buffers"] = buffers;
    result["params_index"] = launch.params_index;
    result["params"] =
        nb::bytes(reinterpret_cast<const char*>(launch.params.data()), launch.params.size());
    result["grid"] = size_tuple(launch.grid);
    result["threadgroup"] = size_tuple(launch.threadgroup);
    result["threadgroup_bytes"] = launch.threadgroup_bytes;
    return result;
}

nb::dict metal_plan_forward(const Options& options, int family, int cores, const nb::tuple& tensors,
                            nb::handle out, nb::handle lse) {
    const std::string& function = options.function->name;
    if (family < 7 || family > 10)
        fail(ErrorKind::value, function, "GPU family is unknown", std::to_string(family),
             "7 to 10");
    Inputs inputs;
    Problem problem = Problem::make(make_request(options, tensors, inputs));
    const Output out_array = import_output(out, function, "out");
    problem.set_out(out_array.view);
    Output lse_array;
    if (!lse.is_none()) {
        lse_array = import_output(lse, function, "softmax_lse");
        problem.set_lse(lse_array.view);
    }
    if (!problem.loops.empty())
        fail(ErrorKind::unsupported, function, "no single plan for this",
             std::to_string(problem.slices()) + " plans", "batch dimensions that are one");
    const Verdict verdict = can_plan_forward(problem);
    if (!verdict.yes)
        fail(ErrorKind::unsupported, function, "no Metal kernel for this", verdict.reason,
             "what one has");
    Capabilities gpu;
    gpu.family = static_cast<Family>(family);
    gpu.cores = cores;
    const LaunchPlan plan = plan_forward(problem, gpu);
    nb::list launches, scratch, data;
    for (const KernelLaunch& launch : plan.launches) launches.append(launch_dict(launch));
    for (const uint64_t bytes : plan.scratch_bytes) scratch.append(bytes);
    for (const std::vector<std::byte>& piece : plan.data)
        data.append(nb::bytes(reinterpret_cast<const char*>(piece.data()), piece.size()));
    nb::dict result;
    result["launches"] = launches;
    result["scratch_bytes"] = scratch;
    result["data"] = data;
    return result;
}

}  // namespace

void bind_metal_plan(nb::module_& m) {
    m.def("metal_plan_forward", &metal_plan_forward, "options"_a, "family"_a, "cores"_a,
          "tensors"_a, "out"_a, "lse"_a.none(),
          nb::sig("def metal_plan_forward(options: Options, family: int, cores: int, "
                  "tensors: tuple[object, ...], out: object, lse: object | None) "
                  "-> dict[str, typing.Any]"),
          "The LaunchPlan of a forward pass on an Apple GPU family (7 to 10), as plain values.");
}

}  // namespace umfa::python
