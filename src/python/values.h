// Python values of options, brought to the types that the core takes. Ranges are the core's business.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "core/dtype.h"
#include "core/quant_operand.h"

namespace umfa::python {

namespace nb = nanobind;

/// Names the argument in messages.
struct Argument {
    const std::string& function;
    const std::string& name;
};

// Each takes Python's own numbers, those of NumPy, and tensors without dimensions that hold one.
double number(const Argument& argument, nb::handle value);
bool flag(const Argument& argument, nb::handle value);
/// `expected` ends the message of a value that is no integer.
int64_t integer(const Argument& argument, nb::handle value, const std::string& expected);
uint64_t unsigned_integer(const Argument& argument, nb::handle value);
/// (left, right); None is INT32_MAX, unbounded.
std::pair<int64_t, int64_t> window(const Argument& argument, nb::handle value);
/// Index of the name that the value is.
size_t choice(const Argument& argument, nb::handle value, const char* const* names, size_t count);
/// The name of a dtype, given as that or by an object of a framework's; empty if it is none.
std::string dtype_name(nb::handle value);
/// Dtype of torch, numpy, jax or mlx, or its name as a string; absent for None.
std::optional<DType> dtype(const Argument& argument, nb::handle value);
/// The format that a text means; absent for None.
std::optional<QuantFormat> quant_format(const Argument& argument, nb::handle value);
/// A name that a message can show.
std::string backend_name(const Argument& argument, nb::handle value);

}  // namespace umfa::python
