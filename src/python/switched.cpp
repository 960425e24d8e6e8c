// A function for torch's dispatcher that calls one of two others, chosen by a flag. In Python it would unpack
// the arguments and pack them again, twice in each of torch's attention calls.
#include <memory>

#include "python/plain.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

constexpr const char* capsule_name = "umfa.switched";

struct Switched {
    nb::object flag, name, ours, theirs;
    nb::object theirs_on_cpu, is_cpu;  // null, or for calls whose second argument is on the CPU
};

/// Null, with Python's error set, if an attribute is missing.
PyObject* chosen(const Switched& own, PyObject* args) {
    const nb::object on = nb::steal(PyObject_GetAttr(own.flag.ptr(), own.name.ptr()));
    if (!on.is_valid()) return nullptr;
    if (on.ptr() == Py_True) return own.ours.ptr();
    if (!own.theirs_on_cpu.is_valid()) return own.theirs.ptr();
    PyObject* tensor = PyTuple_GetItem(args, 1);  // the first is the dispatcher's set of keys
    if (!tensor) return nullptr;
    const nb::object cpu = nb::steal(PyObject_GetAttr(tensor, own.is_cpu.ptr()));
    if (!cpu.is_valid()) return nullptr;
    return (cpu.ptr() == Py_True ? own.theirs_on_cpu : own.theirs).ptr();
}

PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
    const auto* own = static_cast<const Switched*>(PyCapsule_GetPointer(self, capsule_name));
    if (!own) return nullptr;
    PyObject* callee = chosen(*own, args);
    return callee ? PyObject_Call(callee, args, kwargs) : nullptr;
}

nb::object switched(nb::object flag, nb::object ours, nb::object theirs, nb::object theirs_on_cpu) {
    static PyMethodDef method{"switched",
                              reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                              METH_VARARGS | METH_KEYWORDS, nullptr};
    auto own = std::make_unique<Switched>(
        Switched{std::move(flag), nb::str("on"), std::move(ours), std::move(theirs), {}, {}});
    if (!theirs_on_cpu.is_none()) {
        own->theirs_on_cpu = std::move(theirs_on_cpu);
        own->is_cpu = nb::str("is_cpu");
    }
    PyObject* made = PyCapsule_New(own.get(), capsule_name, [](PyObject* capsule) {
        delete static_cast<Switched*>(PyCapsule_GetPointer(capsule, capsule_name));
    });
    if (!made) throw nb::python_error();
    own.release();
    const nb::object capsule = nb::steal(made);
    PyObject* function = PyCFunction_NewEx(&method, capsule.ptr(), nullptr);
    if (!function) throw nb::python_error();
    return nb::steal(function);
}

}  // namespace

void bind_switched(nb::module_& m) {
    m.def("switched", &switched, "flag"_a, "ours"_a, "theirs"_a, "theirs_on_cpu"_a.none(),
          nb::sig("def switched(flag: object, ours: collections.abc.Callable[..., typing.Any], "
                  "theirs: collections.abc.Callable[..., typing.Any], "
                  "theirs_on_cpu: collections.abc.Callable[..., typing.Any] | None) "
                  "-> collections.abc.Callable[..., typing.Any]"),
          "A kernel for torch's dispatcher that calls `ours` while `flag.on` is True, else "
          "`theirs`,\n"
          "or `theirs_on_cpu` if that is given and the first tensor's is_cpu is True.");
}

}  // namespace umfa::python
