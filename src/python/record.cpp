#include "python/record.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <functional>
#include <optional>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "python/values.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

constexpr size_t tensor_count = std::size(tensor_fields);
constexpr size_t operand_count = 0
#define UMFA_OPERAND(name) +1
#include "core/options.def"
    ;

const std::unordered_map<std::string_view, Field>& fields() {
    static const auto* all = [] {
        auto* map = new std::unordered_map<std::string_view, Field>;
        for (size_t i = 0; i < field_count; ++i)
            map->emplace(name_of(static_cast<Field>(i)), static_cast<Field>(i));
        return map;
    }();
    return *all;
}

/// The field that another name of it means.
std::optional<Field> alias(std::string_view name) {
#define UMFA_ALIAS(other, of) \
    if (name == #other) return Field::of;
#include "core/options.def"
    return {};
}

std::optional<uint8_t> tensor_index(Field field) {
    for (size_t i = 0; i < tensor_count; ++i)
        if (tensor_fields[i].field == field) return static_cast<uint8_t>(i);
    return {};
}

[[noreturn]] void unknown(const std::string& what, const std::string& name) {
    throw nb::type_error((what + " has no field '" + name + "'; see src/core/options.def").c_str());
}

/// Whether None stands for the default, as transformers and JAX's users pass it. torch refuses it
/// for `is_causal`.
bool none_is_default(Field field, const Argument& argument) {
    return (field == Field::softcap || field == Field::causal) && argument.name == name_of(field);
}

/// Sets an option that is no tensor. False if the field is one.
bool set_value(AttentionOptions& values, Field field, const Argument& argument, nb::handle value) {
    const bool none = value.is_none();
    if (none && none_is_default(field, argument)) return true;
    switch (field) {
#define UMFA_NUMBER(name, default_value, text) \
    case Field::name: values.name = number(argument, value); return true;
#define UMFA_MAYBE_NUMBER(name, text)                     \
    case Field::name:                                     \
        values.name.reset();                              \
        if (!none) values.name = number(argument, value); \
        return true;
#define UMFA_COUNT(name, default_value, text) \
    case Field::name: values.name = integer(argument, value, "an integer"); return true;
#define UMFA_MAYBE_COUNT(name, text)                                           \
    case Field::name:                                                          \
        values.name.reset();                                                   \
        if (!none) values.name = integer(argument, value, "a number of rows"); \
        return true;
#define UMFA_SEED(name, text)                                       \
    case Field::name:                                               \
        values.name.reset();                                        \
        if (!none) values.name = unsigned_integer(argument, value); \
        return true;
#define UMFA_OFFSET(name, text) \
    case Field::name: values.name = unsigned_integer(argument, value); return true;
#define UMFA_FLAG(name, default_value, text) \
    case Field::name: values.name = flag(argument, value); return true;
#define UMFA_CHOICE(name, type, default_value, text)                                 \
    case Field::name:                                                                \
        values.name = static_cast<type>(                                             \
            choice(argument, value, names_of(type{}), std::size(names_of(type{})))); \
        return true;
#define UMFA_DTYPE(name, text) \
    case Field::name: values.name = dtype(argument, value); return true;
#define UMFA_FORMAT(name, text) \
    case Field::name: values.name = quant_format(argument, value); return true;
#define UMFA_RESULT_FLAG(name, default_value) \
    case Field::name: values.name = flag(argument, value); return true;
#define UMFA_WINDOW(name, text)                                                      \
    case Field::name:                                                                \
        std::tie(values.name##_left, values.name##_right) = window(argument, value); \
        return true;
#include "core/options.def"
        default: return false;
    }
}

void init_function(Function* self, std::string name, const std::string& layout, bool broadcasts,
                   const nb::kwargs& names) {
    if (layout != "bshd" && layout != "bhsd") throw nb::value_error("layout is 'bshd' or 'bhsd'");
    new (self) Function(std::move(name));
    self->layout = layout == "bshd" ? Layout::bshd : Layout::bhsd;
    self->broadcasts = broadcasts;
    for (const auto& [key, spelled] : names) {
        const std::string field = nb::cast<std::string>(key);
        const auto found = fields().find(field);
        if (found == fields().end()) unknown("a function", field);
        (*self)[found->second] = nb::cast<std::string>(spelled);
    }
}

/// The names by which the function's callers may give the fields.
nb::frozenset parameters_of(const Function& function) {
    nb::list names;
    for (const std::string& name : function.names) names.append(name);
#define UMFA_ALIAS(other, of) names.append(#other);
#include "core/options.def"
    return nb::frozenset(names);
}

void init_attention(Attention* self, std::shared_ptr<const Function> function, nb::handle backend,
                    const nb::kwargs& arguments) {
    new (self) Attention();
    Options& options = self->options;
    static const std::string backend_argument = "backend";
    const std::string& name = function->name;
    nb::object objects[tensor_count];
    for (const auto& [key, value] : arguments) {
        const std::string_view given(nb::borrow<nb::str>(key).c_str());
        const auto found = fields().find(given);
        std::optional<Field> field;
        if (found != fields().end()) field = found->second;
        const bool is_alias = !field && (field = alias(given)).has_value();
        if (!field) unknown("Attention", std::string(given));
        if (const std::optional<uint8_t> index = tensor_index(*field)) {
            const bool optional = *index >= operand_count;
            if (value.is_none() && optional) continue;
            if (objects[*index])
                fail(ErrorKind::value, name,
                     (*function)[*field] + " and " + std::string(given) + " exclude each other",
                     "both", "one of them");
            objects[*index] = nb::borrow(value);
            if (is_alias) {  // messages name it as the caller did
                auto own = std::make_shared<Function>(*function);
                (*own)[*field] = given;
                function = std::move(own);
            }
            continue;
        }
        set_value(options.values, *field, {name, (*function)[*field]}, value);
    }
    options.function = std::move(function);
    options.backend = backend_name({name, backend_argument}, backend);
    for (uint8_t i = 0; i < tensor_count; ++i) {
        if (!objects[i]) continue;
        options.given.push_back(i);
        self->tensors[options.spelled(i).c_str()] = objects[i];
    }
}

template <class Predicate>
nb::tuple names_where(const Options& options, Predicate&& holds) {
    nb::list names;
    for (const uint8_t index : options.given)
        if (holds(tensor_fields[index])) names.append(options.spelled(index));
    return nb::tuple(names);
}

/// The options that are no tensors and differ from their defaults, as Attention takes them.
nb::dict changed_values(const AttentionOptions& values) {
    const AttentionOptions defaults;
    nb::dict changed;
#define UMFA_NUMBER(name, default_value, text) \
    if (values.name != defaults.name) changed[#name] = values.name;
#define UMFA_COUNT(name, default_value, text) UMFA_NUMBER(name, default_value, text)
#define UMFA_OFFSET(name, text) UMFA_NUMBER(name, 0, text)
#define UMFA_FLAG(name, default_value, text) UMFA_NUMBER(name, default_value, text)
#define UMFA_RESULT_FLAG(name, default_value) UMFA_NUMBER(name, default_value, )
#define UMFA_MAYBE_NUMBER(name, text) \
    if (values.name) changed[#name] = *values.name;
#define UMFA_MAYBE_COUNT(name, text) UMFA_MAYBE_NUMBER(name, text)
#define UMFA_SEED(name, text) UMFA_MAYBE_NUMBER(name, text)
#define UMFA_CHOICE(name, type, default_value, text) \
    if (values.name != defaults.name)                \
        changed[#name] = names_of(type{})[static_cast<size_t>(values.name)];
#define UMFA_DTYPE(name, text) \
    if (values.name) changed[#name] = name_of(*values.name);
#define UMFA_FORMAT(name, text) \
    if (values.name) changed[#name] = text_of(*values.name);
#define UMFA_WINDOW(name, text)                       \
    if (values.name##_left != defaults.name##_left || \
        values.name##_right != defaults.name##_right) \
        changed[#name] = nb::make_tuple(values.name##_left, values.name##_right);
#include "core/options.def"
    return changed;
}

nb::dict description(const Options& options) {
    const Function& function = *options.function;
    nb::dict names;
    for (size_t i = 0; i < field_count; ++i) {
        const char* field = name_of(static_cast<Field>(i));
        if (function.names[i] != field) names[field] = function.names[i];
    }
    nb::list tensors;
    for (const uint8_t index : options.given) tensors.append(name_of(tensor_fields[index].field));
    nb::dict described;
    described["function"] = function.name;
    described["layout"] = function.layout == Layout::bshd ? "bshd" : "bhsd";
    described["broadcasts"] = function.broadcasts;
    described["names"] = names;
    described["backend"] = options.backend;
    described["tensors"] = tensors;
    described["values"] = changed_values(options.values);
    return described;
}

bool is_written(const Options& options, const TensorField& tensor) {
    if (tensor.field == Field::out) return true;
    const bool appends = options.has(Field::new_key) || options.has(Field::new_value);
    return appends && (tensor.field == Field::key || tensor.field == Field::value);
}

/// Equal for equal options: what differs most between the calls of a program.
size_t hash_of(const Options& options) {
    size_t hash = std::hash<std::string>{}(options.function->name);
    const auto mix = [&](size_t value) { hash = hash * 31 + value; };
    for (const uint8_t index : options.given) mix(index);
    mix(options.values.causal);
    mix(std::hash<double>{}(options.values.softmax_scale.value_or(0)));
    mix(std::hash<double>{}(options.values.dropout_p));
    mix(std::hash<uint64_t>{}(options.values.dropout_seed.value_or(0)));
    mix(std::hash<int64_t>{}(options.values.window_size_left));
    return hash;
}

Options replace(const Options& options, const nb::kwargs& arguments) {
    Options changed = options;
    for (const auto& [key, value] : arguments) {
        const std::string name = nb::cast<std::string>(key);
        const auto found = fields().find(name);
        if (found != fields().end() && found->second == Field::out && value.is_none()) {
            std::erase_if(changed.given,
                          [](uint8_t i) { return tensor_fields[i].field == Field::out; });
            continue;
        }
        if (found == fields().end() ||
            !set_value(changed.values, found->second, {options.function->name, name}, value))
            unknown("Options", name);
    }
    return changed;
}

}  // namespace

bool Options::has(Field field) const {
    for (const uint8_t index : given)
        if (tensor_fields[index].field == field) return true;
    return false;
}

bool Options::operator==(const Options& other) const {
    return given == other.given && values == other.values && backend == other.backend &&
           (function == other.function || *function == *other.function);
}

AttentionRequest make_request(const Options& options, const nb::tuple& tensors, Inputs& inputs) {
    const Function& function = *options.function;
    AttentionRequest request(function);
    static_cast<AttentionOptions&>(request) = options.values;
    if (nb::len(tensors) != options.given.size())
        fail(ErrorKind::internal, function.name, "tensors are missing",
             std::to_string(nb::len(tensors)), std::to_string(options.given.size()));
    inputs.read.reserve(options.given.size());  // or it would grow, and move, with each tensor
    for (size_t i = 0; i < options.given.size(); ++i) {
        const TensorField& tensor = tensor_fields[options.given[i]];
        const std::string& name = options.spelled(options.given[i]);
        if (is_written(options, tensor)) {  // a capsule opens only once
            inputs.written.push_back(import_output(tensors[i], function.name, name));
            request.*tensor.view = inputs.written.back().view;
        } else {
            inputs.read.push_back(import_input(tensors[i], function.name, name));
            request.*tensor.view = inputs.read.back().view;
        }
    }
    return request;
}

void bind_record(nb::module_& m) {
    nb::class_<Function>(m, "Function",
                         "A public function: its name, its layout, and how its callers spell the\n"
                         "fields of `Attention` where they do not use the fields' own names.")
        .def("__init__", &init_function, "name"_a, nb::kw_only(), "layout"_a = "bshd",
             "broadcasts"_a = false, "names"_a,
             nb::sig("def __init__(self, name: str, *, layout: str = 'bshd', "
                     "broadcasts: bool = False, **names: str) -> None"))
        .def_ro("name", &Function::name)
        .def_prop_ro("parameters", &parameters_of,
                     nb::sig("def parameters(self, /) -> frozenset[str]"),
                     "Names by which callers may give the fields.");

    nb::class_<Options>(m, "Options", "What of a call may be kept for the next one.")
        .def_prop_ro("function", [](const Options& o) { return o.function->name; })
        .def_ro("backend", &Options::backend)
        .def_prop_ro(
            "names",
            [](const Options& o) {
                return names_where(o, [](const TensorField&) { return true; });
            },
            nb::sig("def names(self, /) -> tuple[str, ...]"),
            "The tensors, as the caller calls them.")
        .def_prop_ro(
            "fields",
            [](const Options& o) {
                nb::list fields;
                for (const uint8_t index : o.given)
                    fields.append(name_of(tensor_fields[index].field));
                return nb::tuple(fields);
            },
            nb::sig("def fields(self, /) -> tuple[str, ...]"),
            "The same tensors, by their names in the record.")
        .def_prop_ro(
            "tables",
            [](const Options& o) {
                return names_where(o, [](const TensorField& tensor) { return tensor.table; });
            },
            nb::sig("def tables(self, /) -> tuple[str, ...]"), "Those of them that the host reads.")
        .def_prop_ro(
            "autocast",
            [](const Options& o) {
                return names_where(o, [](const TensorField& tensor) { return tensor.autocast; });
            },
            nb::sig("def autocast(self, /) -> tuple[str, ...]"),
            "Those of them that torch.autocast casts.")
        .def_prop_ro(
            "written",
            [](const Options& o) {
                return names_where(
                    o, [&](const TensorField& tensor) { return is_written(o, tensor); });
            },
            nb::sig("def written(self, /) -> tuple[str, ...]"), "Those of them that are written.")
        .def_prop_ro(
            "description", &description,
            nb::sig("def description(self, /) -> dict[str, typing.Any]"),
            "All of it in plain values: a record of the same function, tensors and values\n"
            "has equal options.")
        .def_prop_ro("dropout_p", [](const Options& o) { return o.values.dropout_p; })
        .def_prop_ro(
            "out_dtype",
            [](const Options& o) {
                const std::optional<DType>& asked = o.values.out_dtype;
                return asked ? nb::object(nb::str(name_of(*asked))) : nb::object(nb::none());
            },
            nb::sig("def out_dtype(self, /) -> str | None"))
        .def_prop_ro("lacks_seed",
                     [](const Options& o) {
                         const double p = o.values.dropout_p;
                         return p > 0 && p < 1 && !o.values.dropout_seed;
                     })
        .def_prop_ro("return_lse", [](const Options& o) { return o.values.return_lse; })
        .def_prop_ro("return_attn_probs",
                     [](const Options& o) { return o.values.return_attn_probs; })
        .def(
            "__eq__",
            [](const Options& o, nb::handle other) {
                const Options* options = nullptr;
                return nb::try_cast(other, options) && options && o == *options;
            },
            "other"_a, nb::sig("def __eq__(self, other: object, /) -> bool"),
            "Whether a call with these options is the same, on the same tensors.")
        .def("__hash__", &hash_of)
        .def("replace", &replace, "values"_a,
             nb::sig("def replace(self, **values: object) -> Options"),
             "The same with other values of options that are no tensors; out=None leaves it out.");

    nb::class_<Attention>(m, "Attention",
                          "The arguments of one attention call; unknown names raise TypeError.")
        .def("__init__", &init_attention, "function"_a, nb::kw_only(), "backend"_a.none(),
             "arguments"_a,
             nb::sig("def __init__(self, function: Function, *, backend: str"
#define UMFA_OPERAND(name) ", " #name ": object"
#define UMFA_INPUT(name, autocast, text) ", " #name ": object | None = None"
#define UMFA_TABLE(name, text) ", " #name ": object | None = None"
#define UMFA_OUTPUT(name) ", " #name ": object | None = None"
#define UMFA_NUMBER(name, value, text) ", " #name ": float | None = None"
#define UMFA_MAYBE_NUMBER(name, text) ", " #name ": float | None = None"
#define UMFA_COUNT(name, value, text) ", " #name ": int = ..."
#define UMFA_MAYBE_COUNT(name, text) ", " #name ": object | None = None"
#define UMFA_SEED(name, text) ", " #name ": int | None = None"
#define UMFA_OFFSET(name, text) ", " #name ": int = 0"
#define UMFA_FLAG(name, value, text) ", " #name ": bool | None = None"
#define UMFA_CHOICE(name, type, value, text) ", " #name ": str = '" #value "'"
#define UMFA_DTYPE(name, text) ", " #name ": object | None = None"
#define UMFA_FORMAT(name, text) ", " #name ": str | None = None"
#define UMFA_WINDOW(name, text) ", " #name ": object | None = None"
#define UMFA_RESULT_FLAG(name, value) ", " #name ": bool = ..."
#define UMFA_ALIAS(name, of) ", " #name ": object | None = None"
#include "core/options.def"
                     ") -> None"))
        // A copy: a reference would keep the tensors alive for as long as the options are kept.
        .def_prop_ro("options", [](const Attention& attention) { return attention.options; })
        .def_ro("tensors", &Attention::tensors,
                nb::sig("def tensors(self, /) -> dict[str, typing.Any]"),
                "The tensors that were given, by the caller's names.");
}

}  // namespace umfa::python
