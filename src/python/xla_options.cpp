#include "python/xla_options.h"

#include <algorithm>
#include <cstring>

#include "core/dlpack_view.h"
#include "core/error.h"

namespace umfa::python {
namespace {

constexpr std::string_view caller = "umfa.xla";

[[noreturn]] void wrong(std::string_view name, const std::string& got, const char* expected) {
    fail(ErrorKind::internal, caller, "attribute " + std::string(name) + " is wrong", got,
         expected);
}

/// One attribute.
struct Attribute {
    std::string_view name;
    xla::AttributeType type;
    const void* value;

    std::string_view text() const {
        if (type != xla::AttributeType::string) refuse("a string");
        const auto& span = *static_cast<const xla::Text*>(value);
        return {span.data, span.size};
    }
    bool flag() const { return scalar<bool>(xla::DataType::pred, "a bool"); }
    double number() const { return scalar<double>(xla::DataType::f64, "a float64"); }
    int64_t integer() const { return scalar<int64_t>(xla::DataType::s64, "an int64"); }
    std::pair<int64_t, int64_t> window() const {
        const auto* array = static_cast<const xla::Array*>(value);
        if (type != xla::AttributeType::array || array->dtype != xla::DataType::s64 ||
            array->size != 2)
            refuse("two int64");
        int64_t sides[2];
        std::memcpy(sides, array->data, sizeof sides);
        return {sides[0], sides[1]};
    }
    template <class Enum>
    Enum choice() const {
        const auto& names = names_of(Enum{});
        for (size_t i = 0; i < std::size(names); ++i)
            if (text() == names[i]) return static_cast<Enum>(i);
        wrong(name, std::string(text()), "one of its values");
    }
    DType dtype() const {
        const std::optional<DType> found = dtype_named(text());
        if (!found) wrong(name, std::string(text()), "a dtype");
        return *found;
    }
    QuantFormat format() const {
        const std::string_view words = text();
        const std::optional<QuantFormat> found = quant_format_from(words);
        if (!found) wrong(name, std::string(words), quant_format_words);
        return *found;
    }

private:
    template <class T>
    T scalar(xla::DataType dtype, const char* expected) const {
        const auto* own = static_cast<const xla::Scalar*>(value);
        if (type != xla::AttributeType::scalar || own->dtype != dtype) refuse(expected);
        T result;
        std::memcpy(&result, own->value, sizeof result);
        return result;
    }
    [[noreturn]] void refuse(const char* expected) const {
        wrong(name, "attribute type " + std::to_string(static_cast<int>(type)), expected);
    }
};

Attribute at(const xla::Attributes& all, int64_t i) {
    return {{all.names[i]->data, all.names[i]->size}, all.types[i], all.values[i]};
}

Attribute named(const xla::Attributes& all, std::string_view name) {
    for (int64_t i = 0; i < all.size; ++i)
        if (const Attribute attribute = at(all, i); attribute.name == name) return attribute;
    wrong(name, "no such attribute", "one in every call");
}

std::optional<Field> field_of(std::string_view name) {
    for (size_t i = 0; i < field_count; ++i)
        if (name == name_of(static_cast<Field>(i))) return static_cast<Field>(i);
    return {};
}

/// False if the attribute is no option.
bool set_value(AttentionOptions& values, const Attribute& given) {
    const std::optional<Field> field = field_of(given.name);
    if (!field) return false;
    switch (*field) {
#define UMFA_NUMBER(name, default_value, text) \
    case Field::name: values.name = given.number(); return true;
#define UMFA_MAYBE_NUMBER(name, text) UMFA_NUMBER(name, , text)
#define UMFA_COUNT(name, default_value, text) \
    case Field::name: values.name = given.integer(); return true;
#define UMFA_MAYBE_COUNT(name, text) UMFA_COUNT(name, , text)
// jax has no attributes of uint64: these are the bits of one.
#define UMFA_SEED(name, text) \
    case Field::name: values.name = static_cast<uint64_t>(given.integer()); return true;
#define UMFA_OFFSET(name, text) UMFA_SEED(name, text)
#define UMFA_FLAG(name, default_value, text) \
    case Field::name: values.name = given.flag(); return true;
#define UMFA_RESULT_FLAG(name, default_value) UMFA_FLAG(name, default_value, )
#define UMFA_CHOICE(name, type, default_value, text) \
    case Field::name: values.name = given.choice<type>(); return true;
#define UMFA_DTYPE(name, text) \
    case Field::name: values.name = given.dtype(); return true;
#define UMFA_FORMAT(name, text) \
    case Field::name: values.name = given.format(); return true;
#define UMFA_WINDOW(name, text)                                             \
    case Field::name:                                                       \
        std::tie(values.name##_left, values.name##_right) = given.window(); \
        return true;
#include "core/options.def"
        default: return false;
    }
}

std::shared_ptr<const Function> function_of(const XlaAttributes& attributes) {
    auto function = std::make_shared<Function>(std::string(attributes.text("function")));
    function->layout = attributes.text("layout") == "bshd" ? Layout::bshd : Layout::bhsd;
    function->broadcasts = attributes.flag("broadcasts");
    for (const std::string& renamed : parts_of(attributes.text("names"), ';')) {  // kv[:, :, 0]
        const size_t middle = renamed.find('=');
        const std::optional<Field> field = field_of(renamed.substr(0, middle));
        if (!field || middle == std::string::npos) wrong("names", renamed, "field=name");
        (*function)[*field] = renamed.substr(middle + 1);
    }
    return function;
}

uint8_t tensor_index(const std::string& name) {
    const std::optional<Field> field = field_of(name);
    for (size_t i = 0; i < std::size(tensor_fields); ++i)
        if (field == tensor_fields[i].field) return static_cast<uint8_t>(i);
    wrong("tensors", name, "tensors of core/options.def");
}

DLDataType dlpack_dtype(xla::DataType dtype) {
    switch (dtype) {
        case xla::DataType::pred: return {kDLBool, 8, 1};
        case xla::DataType::s8: return {kDLInt, 8, 1};
        case xla::DataType::s16: return {kDLInt, 16, 1};
        case xla::DataType::s32: return {kDLInt, 32, 1};
        case xla::DataType::s64: return {kDLInt, 64, 1};
        case xla::DataType::u8: return {kDLUInt, 8, 1};
        case xla::DataType::u16: return {kDLUInt, 16, 1};
        case xla::DataType::u32: return {kDLUInt, 32, 1};
        case xla::DataType::u64: return {kDLUInt, 64, 1};
        case xla::DataType::f16: return {kDLFloat, 16, 1};
        case xla::DataType::f32: return {kDLFloat, 32, 1};
        case xla::DataType::f64: return {kDLFloat, 64, 1};
        case xla::DataType::bf16: return {kDLBfloat, 16, 1};
    }
    return {3, 8, 1};  // an opaque handle, which view_of refuses by name
}

}  // namespace

std::string_view XlaAttributes::text(std::string_view name) const {
    return named(attributes_, name).text();
}

bool XlaAttributes::flag(std::string_view name) const { return named(attributes_, name).flag(); }

Options XlaAttributes::options(std::initializer_list<std::string_view> also) const {
    Options options;
    options.function = function_of(*this);
    options.backend = text("backend");
    for (const std::string& name : parts_of(text("tensors")))
        options.given.push_back(tensor_index(name));
    for (int64_t i = 0; i < attributes_.size; ++i) {
        const Attribute attribute = at(attributes_, i);
        static constexpr std::string_view common[] = {"function", "layout",  "broadcasts",
                                                      "names",    "backend", "tensors"};
        const auto is_it = [&](std::string_view name) { return name == attribute.name; };
        if (std::any_of(std::begin(common), std::end(common), is_it) ||
            std::any_of(also.begin(), also.end(), is_it))
            continue;
        if (!set_value(options.values, attribute))
            wrong(attribute.name, "an unknown name", "an option of core/options.def");
    }
    return options;
}

AttentionRequest make_request(const Options& options, xla::Buffer* const* buffers) {
    AttentionRequest request(*options.function);
    static_cast<AttentionOptions&>(request) = options.values;
    for (size_t i = 0; i < options.given.size(); ++i)
        request.*tensor_fields[options.given[i]].view =
            view_of(*buffers[i], options.function->name, options.spelled(options.given[i]));
    return request;
}

TensorView view_of(const xla::Buffer& buffer, std::string_view function, std::string_view name) {
    DLTensor tensor{};
    tensor.data = buffer.data;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<int32_t>(buffer.rank);
    tensor.dtype = dlpack_dtype(buffer.dtype);
    tensor.shape = buffer.dims;
    return umfa::view_of(tensor, function, name);
}

std::vector<std::string> parts_of(std::string_view text, char separator) {
    std::vector<std::string> parts;
    while (!text.empty()) {
        const size_t end = std::min(text.find(separator), text.size());
        parts.emplace_back(text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return parts;
}

}  // namespace umfa::python
