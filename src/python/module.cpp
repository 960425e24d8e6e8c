// The Python binding: DLPack in, exceptions out. The core checks and computes; python/umfa/ decides
// what a tensor of each framework is.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <exception>

#include "core/dispatch.h"
#include "core/error.h"
#include "core/instruments.h"
#include "core/stats.h"
#include "python/plain.h"
#include "python/record.h"
#include "python/running.h"
#include "python/values.h"
#include "umfa/umfa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace umfa;
using namespace umfa::python;

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

nb::list self_test_reports(bool run) {
    SelfTestReports reports;
    without_gil([&] { reports = self_tests(run); });
    nb::list all;
    for (const auto& shared : reports) {
        const SelfTestReport& report = *shared;
        nb::dict faults;
        for (const SelfTestResult& result : report.results)
            faults[result.family.c_str()] = result.fault;
        nb::dict one;
        one["dtype"] = report.dtype;
        one["device"] = report.device;
        one["system"] = report.system;
        one["when"] = report.when;
        one["seconds"] = report.seconds;
        one["pipelines"] = report.pipelines;
        one["faults"] = faults;
        nb::list tried_again;
        for (const std::string& family : report.tried_again) tried_again.append(family);
        one["tried_again"] = tried_again;
        one["kept"] = report.kept;
        one["not_kept"] = report.not_kept;
        all.append(one);
    }
    return all;
}

nb::object tuned_dict(const std::optional<Tuned>& tuned) {
    if (!tuned) return nb::none();
    nb::dict result;
    result["worthwhile_flop"] = tuned->values.worthwhile_flop;
    result["decode_threadgroups_per_core"] = tuned->values.decode_threadgroups_per_core;
    result["tiles"] = tuned->values.tiles;
    result["tile_choices"] = tuned->tile_choices;
    result["when"] = tuned->when;
    result["device"] = tuned->device;
    result["system"] = tuned->system;
    nb::list measured;
    for (const std::string& line : tuned->measured) measured.append(line);
    result["measured"] = measured;
    result["kept"] = tuned->kept;
    result["ignored"] = tuned->ignored;
    return result;
}

nb::object tune_values(double worthwhile_flop, int64_t decode_threadgroups_per_core,
                       std::vector<std::string> measured, bool keep,
                       std::vector<std::string> tiles) {
    Tuned tuned;
    tuned.values = {worthwhile_flop, decode_threadgroups_per_core, std::move(tiles)};
    tuned.measured = std::move(measured);
    return tuned_dict(tune(tuned, keep));
}

PyObject* unsupported_error = nullptr;

void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const Error& error) {
        PyObject* type = PyExc_RuntimeError;
        switch (error.kind()) {
            case ErrorKind::value: type = PyExc_ValueError; break;
            case ErrorKind::type: type = PyExc_TypeError; break;
            case ErrorKind::unsupported: type = unsupported_error; break;
            case ErrorKind::memory: type = PyExc_MemoryError; break;
            case ErrorKind::device:
            case ErrorKind::internal: break;
        }
        PyErr_SetString(type, error.what());
    }
}

}  // namespace

NB_MODULE(_ext, m) {
    // A daemon thread that waits in without_gil() for the process to end keeps its arguments alive:
    // no leak that a user should read about.
    nb::set_leak_warnings(false);
    m.doc() = "The Python binding of libumfa. Private: use the functions of the package `umfa`.";

    const std::string name = nb::cast<std::string>(m.attr("__name__")) + ".UnsupportedError";
    unsupported_error = PyErr_NewExceptionWithDoc(
        name.c_str(), "What was asked for is sound, but umfa cannot do it (yet).",
        PyExc_NotImplementedError, nullptr);
    m.attr("UnsupportedError") = nb::handle(unsupported_error);
    nb::register_exception_translator(translate);

    m.def(
        "integer",
        [](const std::string& function, const std::string& name, nb::handle value,
           const std::string& expected) { return integer({function, name}, value, expected); },
        "function"_a, "name"_a, "value"_a.none(), "expected"_a,
        nb::sig("def integer(function: str, name: str, value: object, expected: str) -> int"),
        "The value as an int of 64 bits; raises what a call would about this argument.");
    bind_record(m);
    bind_attention(m);
    bind_combine(m);
    bind_backward(m);
    bind_plain(m);
    bind_repeated(m);
    bind_switched(m);
    bind_quantize(m);
    bind_memory(m);
    bind_xla(m);

    m.def("version", [] { return umfa_version(); }, "Version of libumfa.");
    m.def("compiler", &compiler, "The compiler that built this module.");
    m.def(
        "backend_name",
        [](nb::handle name, const std::string& function) {
            static const std::string argument = "backend";
            return umfa::backend_name(python::backend_name({function, argument}, name), function);
        },
        "name"_a.none(), "function"_a = "umfa._ext.backend_name",
        nb::sig("def backend_name(name: object, function: str = ...) -> str"),
        "The name, or what the environment makes of 'auto'; raises what a call would about it.");
    m.def(
        "backends",
        [] {
            std::vector<std::tuple<std::string, bool, std::string, std::string>> list;
            for (BackendInfo& info : backends())
                list.emplace_back(std::move(info.name), info.available, std::move(info.reason),
                                  std::move(info.device));
            return list;
        },
        "(name, available, why not, device) of every backend.");
    m.def("self_tests", &self_test_reports, "run"_a,
          nb::sig("def self_tests(run: bool) -> list[dict[str, typing.Any]]"),
          "Outcomes of the GPU self-test, as dicts. `run`: first tests each untested dtype.");
    m.def(
        "tuning", [] { return tuned_dict(tuning()); },
        nb::sig("def tuning() -> dict[str, typing.Any] | None"),
        "The GPU's tuned choices in use and where they come from; None without a GPU.");
    m.def("tune", &tune_values, "worthwhile_flop"_a, "decode_threadgroups_per_core"_a, "measured"_a,
          "keep"_a, "tiles"_a = std::vector<std::string>(),
          nb::sig("def tune(worthwhile_flop: float, decode_threadgroups_per_core: int, "
                  "measured: list[str], keep: bool, tiles: list[str] = []) "
                  "-> dict[str, typing.Any]"),
          "Uses other choices in this process, and if `keep` says so in later ones.");
    m.def(
        "stats",
        [] {
            const Stats& counts = stats();
            nb::dict result;
            result["cpu_calls"] = counts.cpu_calls.load();
            result["metal_calls"] = counts.metal_calls.load();
            result["calls_while_compiling"] = counts.calls_while_compiling.load();
            result["tensors_in_place"] = counts.tensors_in_place.load();
            result["tensors_copied"] = counts.tensors_copied.load();
            result["bytes_copied"] = counts.bytes_copied.load();
            result["pipelines"] = counts.pipelines.load();
            result["pipelines_from_text"] = counts.pipelines_from_text.load();
            result["pipelines_from_archive"] = counts.pipelines_from_archive.load();
            result["command_buffers"] = counts.command_buffers.load();
            result["queues_replaced"] = counts.queues_replaced.load();
            result["gpu_seconds"] = static_cast<double>(counts.gpu_nanoseconds.load()) * 1e-9;
            return result;
        },
        nb::sig("def stats() -> dict[str, typing.Any]"), "What umfa has done so far, by name.");
    m.def(
        "shader_text",
        [](const std::string& file) {
            const std::string_view text = metal::shader_text(file);
            if (text.empty())
                fail(ErrorKind::value, "umfa._ext.shader_text", "no such file is embedded", file,
                     "a file of shaders/, e.g. 'forward.metal'");
            return std::string(text);
        },
        "file"_a, "The Metal text of a shader with its own headers put in.");
    m.def(
        "metallib", [] { return nb::bytes(metal::metallib().data(), metal::metallib().size()); },
        "The kernels that the build compiled ahead; empty where it had no compiler of Apple's.");
    m.def("cpu_features", &cpu::features, "Instruction set extensions of this CPU.");
    m.def("cpu_isa", &cpu::isa_in_use, "Instruction set whose kernels run.");
    m.def("cpu_isas", &cpu::isa_list, "(name, usable on this CPU) of every kernel set built in.");
    m.def("set_cpu_isa", &cpu::set_isa, "name"_a, "Forces a kernel set; 'auto' undoes it.");
    m.def("num_threads", &cpu::num_threads, "Threads that one call uses.");
    m.def("set_num_threads", &cpu::set_num_threads, "count"_a, "Sets the threads one call uses.");

    bind_measure(m);
    bind_metal_plan(m);
}
