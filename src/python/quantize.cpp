// Quantising and dequantising tensors of any framework.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "core/dispatch.h"
#include "core/instruments.h"
#include "python/player.h"
#include "python/record.h"
#include "python/running.h"
#include "python/values.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

/// A format and the order of a tensor's dimensions: what Python's records of quantised tensors hold.
struct PyFormat {
    QuantFormat format;
    Layout layout = Layout::bshd;
};

template <class Enum, size_t N>
Enum chosen(const std::string& function, const std::string& name, nb::handle value,
            const char* const (&names)[N]) {
    return static_cast<Enum>(choice({function, name}, value, names, N));
}

/// The name that the core has; also "fp8_e4m3" and "fp8_e5m2", and dtypes of the frameworks.
QuantDType quant_dtype(const std::string& function, nb::handle value) {
    std::string name = dtype_name(value);
    if (name == "fp8_e4m3") name = "float8_e4m3fn";
    if (name == "fp8_e5m2") name = "float8_e5m2";
    return chosen<QuantDType>(function, "dtype", nb::str(name.c_str()), quant_dtype_names);
}

/// (tokens, channels), None for all channels.
std::pair<int64_t, int64_t> block_of(const std::string& function, nb::handle value) {
    const bool pair =
        (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) && nb::len(value) == 2;
    if (!pair)
        fail(ErrorKind::type, function, "block is not a pair",
             nb::cast<std::string>(nb::repr(value)), "(tokens, channels), or None");
    static const std::string tokens = "block's tokens", channels = "block's channels";
    const nb::object second = value[1];
    return {integer({function, tokens}, value[0], "1 or more"),
            second.is_none() ? 0 : integer({function, channels}, second, "a multiple of 16")};
}

PyFormat make_format(const std::string& function, nb::handle dtype, nb::handle granularity,
                     nb::handle offset, nb::handle scale_dtype, nb::handle block,
                     nb::handle layout) {
    static constexpr const char* layouts[] = {"bshd", "bhsd"};
    QuantChoice choice;
    choice.dtype = quant_dtype(function, dtype);
    if (!granularity.is_none())
        choice.granularity =
            chosen<Granularity>(function, "granularity", granularity, granularity_names);
    choice.offset = chosen<QuantOffset>(function, "offset", offset, quant_offset_names);
    if (!scale_dtype.is_none())
        choice.scales = chosen<QuantScales>(
            function, "scale_dtype", nb::str(dtype_name(scale_dtype).c_str()), quant_scales_names);
    if (!block.is_none())
        std::tie(choice.block_rows, choice.block_channels) = block_of(function, block);
    return {QuantFormat::of(choice), chosen<Layout>(function, "layout", layout, layouts)};
}

nb::object block_tuple(const QuantFormat& format) {
    if (format.granularity != Granularity::block) return nb::none();
    const nb::object channels =
        format.block_channels ? nb::object(nb::int_(format.block_channels)) : nb::none();
    return nb::make_tuple(format.block_rows, channels);
}

/// The tensors of a quantised operand, kept for as long as their views are used.
struct QuantInputs {
    Input data, scales, offsets;
    Quantization quantization;

    QuantInputs(const std::string& function, nb::handle given_data, nb::handle given_scales,
                nb::handle given_offsets, const PyFormat& format, int64_t channels)
        : data(import_input(given_data, function, "data")) {
        quantization.format = format.format;
        quantization.format.channels = channels;
        if (!given_scales.is_none()) {
            scales = import_input(given_scales, function, "scales");
            quantization.scales = scales.view;
        }
        if (!given_offsets.is_none()) {
            offsets = import_input(given_offsets, function, "zero_points");
            quantization.offsets = offsets.view;
        }
    }
};

nb::tuple quantize_tensor(const std::string& function, nb::handle x, const PyFormat& format,
                          bool allow_nonfinite, const std::string& backend_name, nb::handle out,
                          nb::callable allocate, nb::handle play) {
    const Input input = import_input(x, function, "x");
    const QuantizeProblem problem = QuantizeProblem::make(
        {function, input.view, format.format, format.layout, allow_nonfinite});
    const Backend& backend = routed(problem, backend_name);
    std::array<nb::object, 3> handed{nb::none(), nb::none(), nb::none()};
    std::array<Output, 3> written;
    const char* const names[] = {"data", "scales", "zero_points"};
    const std::optional<TensorView> shapes[] = {problem.data_shape(), problem.scales_shape(),
                                                problem.zero_points_shape()};
    std::optional<TensorView> zero_points;
    for (size_t i = 0; i < 3; ++i) {
        if (!shapes[i]) continue;
        nb::object memory;
        if (out.is_none()) {
            const nb::object allocated =
                allocate(shape_tuple(*shapes[i]), name_of(shapes[i]->dtype));
            memory = allocated[0];
            handed[i] = allocated[1];
        } else {
            memory = out[i];
        }
        written[i] = import_output(memory, function, names[i]);
        if (i == 2) zero_points = written[i].view;
    }
    const QuantizeResults results = problem.results(written[0].view, written[1].view, zero_points);
    if (play.is_none()) {
        without_gil([&] { quantize(backend, problem, results); });
    } else {
        PythonPlayer player(play);
        quantize(backend, problem, results, player);
    }
    return nb::make_tuple(handed[0], handed[1], handed[2]);
}

nb::object dequantize_tensor(const std::string& function, nb::handle data, nb::handle scales,
                             nb::handle offsets, const PyFormat& format, int64_t channels,
                             nb::handle given_dtype, const std::string& backend_name,
                             nb::callable allocate, nb::handle play) {
    const QuantInputs inputs(function, data, scales, offsets, format, channels);
    static const std::string name = "dtype";
    DequantizeRequest request{function, inputs.data.view, inputs.quantization, format.layout,
                              DType::f32};
    request.out_dtype = dtype({function, name}, given_dtype).value_or(DType::f32);
    const DequantizeProblem problem = DequantizeProblem::make(request);
    const Backend& backend = routed(problem, backend_name);
    const nb::object out = allocate(shape_tuple(problem.out_shape()), name_of(problem.out_dtype));
    const Output output = import_output(out[0], function, "out");
    const DequantizeResults results = problem.results(output.view);
    if (play.is_none()) {
        without_gil([&] { dequantize(backend, problem, results); });
    } else {
        PythonPlayer player(play);
        dequantize(backend, problem, results, player);
    }
    return out[1];
}

// ---- plans, for the executors that are written in Python -------------------------------------------

nb::dict metal_plan_quantize(int family, int cores, nb::handle x, const PyFormat& format,
                             const nb::tuple& out, nb::handle faults) {
    const std::string function = "umfa._ext.metal_plan_quantize";
    const Input input = import_input(x, function, "x");
    const QuantizeProblem problem =
        QuantizeProblem::make({function, input.view, format.format, format.layout, true});
    const Output data = import_output(out[0], function, "data");
    const Output scales = import_output(out[1], function, "scales");
    Output zeros, wrong;
    std::optional<TensorView> zero_points;
    if (!out[2].is_none()) {
        zeros = import_output(out[2], function, "zero_points");
        zero_points = zeros.view;
    }
    uint8_t* bytes = nullptr;
    if (!faults.is_none()) {
        wrong = import_output(faults, function, "faults");
        bytes = reinterpret_cast<uint8_t*>(wrong.view.address());
    }
    return plan_dict(metal::plan(problem, problem.results(data.view, scales.view, zero_points),
                                 bytes, family, cores));
}

nb::dict metal_plan_dequantize(int family, int cores, nb::handle data, nb::handle scales,
                               nb::handle offsets, const PyFormat& format, int64_t channels,
                               nb::handle out) {
    const std::string function = "umfa._ext.metal_plan_dequantize";
    const QuantInputs inputs(function, data, scales, offsets, format, channels);
    const Output output = import_output(out, function, "out");
    const DequantizeProblem problem = DequantizeProblem::make(
        {function, inputs.data.view, inputs.quantization, format.layout, output.view.dtype});
    return plan_dict(metal::plan(problem, problem.results(output.view), family, cores));
}

void check_quantized(const std::string& function, nb::handle data, nb::handle scales,
                     nb::handle offsets, const PyFormat& format, int64_t channels) {
    const QuantInputs inputs(function, data, scales, offsets, format, channels);
    QuantOperand::make(Checker{function}, inputs.data.view, "data", inputs.quantization,
                       format.layout);
}

void bind_format(nb::module_& m) {
    nb::class_<PyFormat>(m, "QuantFormat", "A quantised format and the layout of its tensor.")
        .def(
            "__init__",
            [](PyFormat* self, const std::string& function, nb::handle dtype,
               nb::handle granularity, nb::handle offset, nb::handle scale_dtype, nb::handle block,
               nb::handle layout) {
                new (self) PyFormat(
                    make_format(function, dtype, granularity, offset, scale_dtype, block, layout));
            },
            "function"_a, "dtype"_a.none(), "granularity"_a.none(), "offset"_a,
            "scale_dtype"_a.none(), "block"_a.none(), "layout"_a.none(),
            nb::sig("def __init__(self, function: str, dtype: object, granularity: object, "
                    "offset: str, scale_dtype: object, block: object, layout: object) -> None"))
        .def_prop_ro("dtype", [](const PyFormat& self) { return self.format.dtype_name(); })
        .def_prop_ro("granularity",
                     [](const PyFormat& self) {
                         return granularity_names[static_cast<int>(self.format.granularity)];
                     })
        .def_prop_ro("offset",
                     [](const PyFormat& self) {
                         return quant_offset_names[static_cast<int>(self.format.offset)];
                     })
        .def_prop_ro("scale_dtype",
                     [](const PyFormat& self) {
                         return quant_scales_names[static_cast<int>(self.format.scales)];
                     })
        .def_prop_ro(
            "block", [](const PyFormat& self) { return block_tuple(self.format); },
            nb::sig("def block(self) -> tuple[int, int | None] | None"))
        .def(
            "text",
            [](const PyFormat& self, int64_t channels) {
                QuantFormat format = self.format;
                format.channels = channels;
                return text_of(format);
            },
            "channels"_a, "The format of a tensor of so many channels, as Attention takes it.")
        .def_prop_ro("layout", [](const PyFormat& self) {
            return self.layout == Layout::bshd ? "bshd" : "bhsd";
        });
}

}  // namespace

void bind_quantize(nb::module_& m) {
    bind_format(m);
    m.def("quantize", &quantize_tensor, "function"_a, "x"_a, "format"_a, "allow_nonfinite"_a,
          "backend"_a, "out"_a.none(), "allocate"_a, "play"_a.none() = nb::none(),
          nb::sig("def quantize(function: str, x: object, format: QuantFormat, "
                  "allow_nonfinite: bool, backend: str, "
                  "out: tuple[object, object, object | None] | None, "
                  "allocate: collections.abc.Callable[[tuple[int, ...], str], "
                  "tuple[object, object]], "
                  "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None "
                  "= None) -> tuple[typing.Any, typing.Any, typing.Any]"),
          "Quantises a DLPack tensor: (data, scales, zero points or None).\n\n"
          "As allocate handed them back; None for each if `out` was given, which is then written.\n"
          "`play`: as of attention_forward; needs `allow_nonfinite`.");
    m.def("dequantize", &dequantize_tensor, "function"_a, "data"_a, "scales"_a.none(),
          "offsets"_a.none(), "format"_a, "channels"_a, "dtype"_a.none(), "backend"_a, "allocate"_a,
          "play"_a.none() = nb::none(),
          nb::sig("def dequantize(function: str, data: object, scales: object | None, "
                  "offsets: object | None, format: QuantFormat, channels: int, "
                  "dtype: object | None, backend: str, "
                  "allocate: collections.abc.Callable[[tuple[int, ...], str], "
                  "tuple[object, object]], "
                  "play: collections.abc.Callable[[dict[str, typing.Any]], int | None] | None "
                  "= None) -> typing.Any"),
          "The numbers of a quantised tensor; float32 if `dtype` is None. `play`: as above.");
    m.def("metal_plan_quantize", &metal_plan_quantize, "family"_a, "cores"_a, "x"_a, "format"_a,
          "out"_a, "faults"_a.none(),
          nb::sig("def metal_plan_quantize(family: int, cores: int, x: object, "
                  "format: QuantFormat, out: tuple[object, object, object | None], "
                  "faults: object | None) -> dict[str, typing.Any]"),
          "The LaunchPlan of quantising into `out`, as plain values. `faults`: a byte for each "
          "block.");
    m.def("metal_plan_dequantize", &metal_plan_dequantize, "family"_a, "cores"_a, "data"_a,
          "scales"_a.none(), "offsets"_a.none(), "format"_a, "channels"_a, "out"_a,
          nb::sig("def metal_plan_dequantize(family: int, cores: int, data: object, "
                  "scales: object | None, offsets: object | None, format: QuantFormat, "
                  "channels: int, out: object) -> dict[str, typing.Any]"),
          "Likewise of the way back.");
    m.def("check_quantized", &check_quantized, "function"_a, "data"_a, "scales"_a.none(),
          "offsets"_a.none(), "format"_a, "channels"_a,
          nb::sig("def check_quantized(function: str, data: object, scales: object | None, "
                  "offsets: object | None, format: QuantFormat, channels: int) -> None"),
          "Raises unless the tensors fit the format.");
}

}  // namespace umfa::python
