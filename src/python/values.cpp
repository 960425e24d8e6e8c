#include "python/values.h"

#include <nanobind/stl/string.h>

#include "core/error.h"

namespace umfa::python {
namespace {

/// repr, shortened.
std::string short_repr(nb::handle value) {
    return nb::cast<std::string>(nb::module_::import_("reprlib").attr("repr")(value));
}

/// An int as a message can show it: str() refuses thousands of digits.
std::string shown(nb::handle value) {
    if (PyLong_Check(value.ptr())) {
        const int64_t bits = nb::cast<int64_t>(value.attr("bit_length")());
        if (bits > 3300) return "an integer of " + std::to_string(bits) + " bits";
    }
    return nb::cast<std::string>(nb::str(value));
}

[[noreturn]] void refuse_type(const Argument& argument, const std::string& what, nb::handle value,
                              const std::string& expected) {
    fail(ErrorKind::type, argument.function, argument.name + what, short_repr(value), expected);
}
[[noreturn]] void refuse_value(const Argument& argument, const std::string& what, nb::handle value,
                               const std::string& expected) {
    fail(ErrorKind::value, argument.function, argument.name + what, shown(value), expected);
}

bool is_plain(nb::handle value) {
    PyObject* object = value.ptr();
    return object == Py_None || PyFloat_CheckExact(object) || PyLong_CheckExact(object) ||
           PyBool_Check(object);
}

/// The number in a NumPy scalar or in a tensor without dimensions; else the value itself.
nb::object unwrapped(const Argument& argument, nb::handle value) {
    nb::object kept = nb::borrow(value);
    if (is_plain(value) || PyUnicode_Check(value.ptr())) return kept;
    try {
        if (!nb::hasattr(value, "item") || !nb::hasattr(value, "shape")) return kept;
        if (nb::len(nb::object(value.attr("shape"))) != 0) return kept;
    } catch (nb::python_error&) {  // tensors without a shape, of torch's nested kind
        return kept;
    }
    if (nb::getattr(value, "requires_grad", nb::bool_(false)).is(nb::bool_(true)))
        fail(ErrorKind::unsupported, argument.function,
             argument.name + " requires grad, which would be lost", "a tensor that requires grad",
             "a number, or a tensor that does not require grad");
    try {
        return value.attr("item")();
    } catch (nb::python_error&) {  // without a value: on torch's meta device, traced by jax
        return kept;
    }
}

bool is_bool(nb::handle value) { return PyBool_Check(value.ptr()); }

/// An int of any size; raises TypeError.
nb::object index_of(const Argument& argument, nb::handle value, const std::string& expected) {
    const nb::object found = unwrapped(argument, value);
    // torch's tensors of one element are indices too, whatever their dimensions.
    if (!is_bool(found) && (is_plain(found) || !nb::hasattr(found, "shape"))) {
        if (PyObject* index = PyNumber_Index(found.ptr())) return nb::steal(index);
        PyErr_Clear();
    }
    refuse_type(argument, " is not an integer", value, expected);
}

}  // namespace

std::string dtype_name(nb::handle value) {
    nb::object name = nb::borrow(value);
    if (!PyUnicode_Check(value.ptr())) {
        if (PyType_Check(value.ptr()))  // numpy.float32
            name = value.attr("__name__");
        else if (nb::getattr(value, "isnative", nb::bool_(false)).is(nb::bool_(true)))
            name = value.attr("name");  // numpy.dtype("float32"), not in another byte order
        else
            name = nb::str(value);  // torch.float32, mlx.core.float32
        for (const char* module : {"torch.", "mlx.core."}) name = name.attr("removeprefix")(module);
    }
    if (!nb::cast<bool>(name.attr("isascii")())) return {};
    return nb::cast<std::string>(name);
}

double number(const Argument& argument, nb::handle value) {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AsDouble(value.ptr());
    const nb::object found = unwrapped(argument, value);
    const nb::object real = nb::module_::import_("numbers").attr("Real");
    if (is_bool(found) || !nb::isinstance(found, real))
        refuse_type(argument, " is not a number", value, "a float");
    const double converted = PyFloat_AsDouble(found.ptr());
    if (converted == -1 && PyErr_Occurred()) {
        const bool overflow = PyErr_ExceptionMatches(PyExc_OverflowError);
        PyErr_Clear();
        if (overflow) refuse_value(argument, " is out of range", found, "a finite float");
        refuse_type(argument, " is not a number", value, "a float");
    }
    return converted;
}

bool flag(const Argument& argument, nb::handle value) {
    if (is_bool(value)) return value.is(nb::bool_(true));
    const nb::object found = unwrapped(argument, value);
    if (is_bool(found)) return found.is(nb::bool_(true));
    if (PyLong_Check(found.ptr())) {
        int overflow = 0;
        const long long integer = PyLong_AsLongLongAndOverflow(found.ptr(), &overflow);
        if (!overflow && (integer == 0 || integer == 1)) return integer == 1;
    }
    refuse_type(argument, " is not a bool", value, "True or False");
}

int64_t integer(const Argument& argument, nb::handle value, const std::string& expected) {
    const nb::object found = index_of(argument, value, expected);
    int overflow = 0;
    const long long converted = PyLong_AsLongLongAndOverflow(found.ptr(), &overflow);
    if (overflow) refuse_value(argument, " does not fit 64 bits", found, expected);
    return converted;
}

uint64_t unsigned_integer(const Argument& argument, nb::handle value) {
    static const std::string expected = "0 to 2**64 - 1";
    const nb::object found = index_of(argument, value, expected);
    const unsigned long long converted = PyLong_AsUnsignedLongLong(found.ptr());
    if (converted == static_cast<unsigned long long>(-1) && PyErr_Occurred()) {
        PyErr_Clear();
        refuse_value(argument, " is out of range", found, expected);
    }
    return converted;
}

std::pair<int64_t, int64_t> window(const Argument& argument, nb::handle value) {
    // As many keys as a sequence can have, which the core takes for none too few.
    constexpr int64_t unbounded = INT32_MAX;
    if (value.is_none()) return {unbounded, unbounded};
    nb::object pair = nb::borrow(value);
    if (!PyTuple_CheckExact(value.ptr()) && !PyList_CheckExact(value.ptr()) &&
        nb::hasattr(value, "tolist") && nb::hasattr(value, "shape")) {
        try {
            pair = value.attr("tolist")();
        } catch (nb::python_error&) {  // an array class, or a tensor without values
        }
    }
    const nb::object sequence = nb::module_::import_("collections.abc").attr("Sequence");
    const bool text = PyUnicode_Check(pair.ptr()) || PyBytes_Check(pair.ptr());
    if (text || !nb::isinstance(pair, sequence) || nb::len(pair) != 2)
        refuse_type(argument, " is not a pair", value,
                    "(left, right) in keys, -1 or None meaning unbounded");
    const auto side = [&](const char* which, int i) -> int64_t {
        const nb::object own = pair[i];
        const std::string name = argument.name + " " + which;
        return own.is_none()
                   ? unbounded
                   : integer({argument.function, name}, own, "-1 (unbounded) or a number of keys");
    };
    const int64_t left = side("left", 0);
    return {left, side("right", 1)};
}

size_t choice(const Argument& argument, nb::handle value, const char* const* names, size_t count) {
    std::string expected;
    for (size_t i = 0; i < count; ++i)
        expected += (i == 0 ? "'" : " or '") + std::string(names[i]) + "'";
    if (!PyUnicode_Check(value.ptr())) refuse_type(argument, " is not a string", value, expected);
    for (size_t i = 0; i < count; ++i)
        if (nb::borrow(value).equal(nb::str(names[i]))) return i;
    fail(ErrorKind::value, argument.function, argument.name + " is unknown", short_repr(value),
         expected);
}

std::optional<DType> dtype(const Argument& argument, nb::handle value) {
    if (value.is_none()) return {};
    const std::optional<DType> found = dtype_named(dtype_name(value));
    if (!found || !is_attention_dtype(*found))
        refuse_type(argument, " is wrong", value, "float32, float16 or bfloat16");
    return found;
}

std::optional<QuantFormat> quant_format(const Argument& argument, nb::handle value) {
    if (value.is_none()) return {};
    if (!PyUnicode_Check(value.ptr()))
        refuse_type(argument, " is not a string", value, quant_format_words);
    const auto found = quant_format_from(nb::cast<std::string>(value));
    if (!found) refuse_value(argument, " is not the text of a format", value, quant_format_words);
    return found;
}

std::string backend_name(const Argument& argument, nb::handle value) {
    static const std::string expected = "'auto', 'metal' or 'cpu'";
    if (!PyUnicode_Check(value.ptr())) refuse_type(argument, " is not a string", value, expected);
    // A message could not show one with a NUL, half a surrogate or no end.
    if (!nb::cast<bool>(value.attr("isprintable")()) || nb::len(value) > 64)
        fail(ErrorKind::value, argument.function, argument.name + " is unknown", short_repr(value),
             expected);
    return nb::cast<std::string>(value);
}

}  // namespace umfa::python
