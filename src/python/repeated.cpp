// Calls with options that an earlier call had: on plain arrays, all of such a call happens here.
#include <cstdint>
#include <deque>
#include <optional>

#include "core/dispatch.h"
#include "core/dlpack_view.h"
#include "python/plain.h"
#include "python/record.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

bool is_plain_type(nb::handle type) {
    const void* own = type.ptr();
    return own == &PyBool_Type || own == &PyLong_Type || own == &PyFloat_Type ||
           own == &PyUnicode_Type || own == Py_TYPE(Py_None);
}

/// A key that is equal for equal options; null if one of them is no plain value, such as a tensor.
nb::object key_of(const nb::dict& options) {
    nb::list key;
    for (const auto [name, value] : options) {
        const nb::handle type = value.type();
        // The types too: True == 1 == 1.0, but an option may accept only one of them.
        if (type.ptr() == reinterpret_cast<PyObject*>(&PyTuple_Type)) {
            for (const nb::handle entry : nb::borrow<nb::tuple>(value)) {
                if (!is_plain_type(entry.type())) return {};
                key.append(entry.type());
            }
        } else if (!is_plain_type(type)) {
            return {};
        }
        key.append(name);
        key.append(type);
        key.append(value);
    }
    return nb::tuple(key);
}

/// The options of one function's calls so far.
class Repeated {
public:
    static constexpr size_t most = 256;

    /// The result of a call whose options are known and whose tensors are plain. For other tensors,
    /// what `keep` was given with the options; None if they are not known, False if they never are.
    nb::object run(const nb::tuple& tensors, const nb::dict& options) const {
        if (nb::len(tensors) != operands) return nb::bool_(false);
        const Entry* entry = plain_ ? &*plain_ : nullptr;
        if (nb::len(options) > 0) {
            const nb::object key = key_of(options);
            if (!key.is_valid()) return nb::bool_(false);
            entry = find(key);
        }
        if (!entry) return entries_.size() < most ? nb::none() : nb::object(nb::bool_(false));
        nb::object result = entry->returns_out ? computed(entry->options, tensors) : nb::object();
        return result.is_valid() ? result : entry->call;
    }

    void keep(const nb::dict& options, const Options& made, nb::object call) {
        Entry entry{made, std::move(call), false};
        const auto& values = made.values;
        entry.returns_out =
            made.given.size() == operands && !values.return_lse && !values.return_attn_probs;
        // What is known stays where it is: another thread may be computing with it.
        if (nb::len(options) == 0) {
            if (!plain_) plain_ = std::move(entry);
            return;
        }
        const nb::object key = key_of(options);
        if (!key.is_valid() || entries_.size() >= most || find(key)) return;
        entries_.push_back(std::move(entry));
        known_[key] = entries_.size() - 1;
    }

private:
    static constexpr size_t operands = 3;

    struct Entry {
        Options options;
        nb::object call;
        bool returns_out;  // and nothing else, of query, key and value alone
    };

    const Entry* find(nb::handle key) const {
        PyObject* index = PyDict_GetItemWithError(known_.ptr(), key.ptr());
        if (!index) {
            if (PyErr_Occurred()) throw nb::python_error();
            return nullptr;
        }
        return &entries_[PyLong_AsSize_t(index)];
    }

    /// Null if the tensors are not plain.
    static nb::object computed(const Options& options, const nb::tuple& tensors) {
        const nb::handle given[operands] = {tensors[0], tensors[1], tensors[2]};
        const nb::handle type = given[0].type();
        if (!given[1].type().is(type) || !given[2].type().is(type)) return {};
        const PlainArrays* arrays = plain_arrays(type);
        if (!arrays || !arrays->ready(given, options.backend)) return {};
        PlainTensor described[operands];
        for (size_t i = 0; i < operands; ++i)
            if (!arrays->describe(given[i], described[i])) return {};

        const Function& function = *options.function;
        AttentionRequest request(function);
        static_cast<AttentionOptions&>(request) = options.values;
        for (size_t i = 0; i < operands; ++i)
            request.*tensor_fields[i].view =
                view_of(described[i].tensor, function.name, options.spelled(uint8_t(i)));
        const Problem problem = Problem::make(request);
        const Backend& backend = routed_call(problem, options.backend);
        PlainTensor written;
        nb::object out =
            arrays->allocate(given[0], described[0].tensor, problem.out_shape(), written);
        if (!out.is_valid()) return {};
        const ForwardResults results =
            problem.results(view_of(written.tensor, function.name, "out"));
        without_gil([&] { forward(backend, problem, results); });
        return arrays->finish(std::move(out));
    }

    std::optional<Entry> plain_;  // without options
    std::deque<Entry> entries_;   // which a call may refer to while another one adds its own
    nb::dict known_;              // their indices by key
};

}  // namespace

void bind_repeated(nb::module_& m) {
    nb::class_<Repeated>(m, "Repeated",
                         "The options of one function's calls so far, and calls that repeat them.")
        .def(nb::init<>())
        .def(
            "run", &Repeated::run, "tensors"_a, "options"_a,
            nb::sig("def run(self, tensors: tuple[object, ...], options: dict[str, object]) "
                    "-> typing.Any"),
            "The result of a call on query, key and value with these keyword options, if they are\n"
            "known and the tensors plain: NumPy's, torch's or mlx's on the CPU, not "
            "differentiated.\n"
            "For other tensors what `keep` was given; None if the options are not known, False\n"
            "if they cannot be.")
        .def("keep", &Repeated::keep, "options"_a, "made"_a, "call"_a,
             nb::sig("def keep(self, options: dict[str, object], made: Options, "
                     "call: object) -> None"),
             "Remembers what a call with these keyword options made of them.");
}

}  // namespace umfa::python
