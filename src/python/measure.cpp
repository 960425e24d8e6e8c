// Measurements for `python -m umfa bench`. The GIL stays held, so that no other Python thread runs
// while something is timed.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "core/dispatch.h"
#include "core/instruments.h"
#include "python/record.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

double time_forward(const Options& options, const nb::tuple& tensors, nb::handle out,
                    int64_t calls) {
    const std::string& function = options.function->name;
    if (calls < 1)
        fail(ErrorKind::value, function, "calls is out of range", std::to_string(calls),
             "at least 1");
    Inputs inputs;
    const Problem problem = Problem::make(make_request(options, tensors, inputs));
    const Backend& backend = routed(problem, options.backend);
    const Output out_array = import_output(out, function, "out");
    const ForwardResults results = problem.results(out_array.view);
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) forward(backend, problem, results);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    return taken.count() / static_cast<double>(calls);
}

}  // namespace

void bind_measure(nb::module_& m) {
    m.def("cpu_peaks", &cpu::peaks,
          "(dtype, instruction set) of every loop for `cpu_peak` that this CPU can run, the best "
          "of each dtype first.");
    m.def("cpu_peak", &cpu::peak, "dtype"_a, "isa"_a = "auto",
          "Operations per second of multiply-adds from registers, over num_threads() threads.\n\n"
          "`dtype` is 'float32', 'float16', 'bfloat16' or 'int8'; of `isa` the family counts.");
    m.def("read_bandwidth", &cpu::read_bandwidth, "bytes"_a,
          "Bytes per second that num_threads() threads read from a buffer of so many bytes.");
    m.def("time_forward", &time_forward, "options"_a, "tensors"_a, "out"_a, "calls"_a,
          nb::sig("def time_forward(options: Options, tensors: tuple[object, ...], out: object, "
                  "calls: int) -> float"),
          "Seconds that one forward pass takes below Python, over `calls` calls.");
}

}  // namespace umfa::python
