#include "python/plain.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "python/exchange.h"
#include "python/running.h"

namespace umfa::python {
namespace {

using namespace nb::literals;

constexpr DLDataType float32{kDLFloat, 32, 1}, float16{kDLFloat, 16, 1};

bool has_dtype(const DLTensor& tensor, DType dtype) {
    if (tensor.dtype.lanes != 1) return false;
    const int code = dtype == DType::bf16 ? kDLBfloat : kDLFloat;
    return tensor.dtype.code == code && tensor.dtype.bits == bits_of(dtype) &&
           (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16);
}

/// Whether the tensor has this shape, and the strides of a new one.
bool is_compact(const DLTensor& tensor, const TensorView& shape) {
    if (tensor.ndim != shape.ndim) return false;
    int64_t compact = 1;
    for (int i = shape.ndim - 1; i >= 0; --i) {
        if (tensor.shape[i] != shape.shape[i] || tensor.strides[i] != compact) return false;
        compact *= std::max<int64_t>(shape.shape[i], 1);
    }
    return true;
}

bool is_empty(const DLTensor& tensor) {
    return std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t n) { return n == 0; });
}

bool is_true(nb::handle object) { return object.ptr() == Py_True; }

/// A call without arguments.
nb::object ask(nb::handle callable) {
    PyObject* result = PyObject_CallNoArgs(callable.ptr());
    if (!result) throw nb::python_error();
    return nb::steal(result);
}

// ---- NumPy ---------------------------------------------------------------------------------------

/// The start of NumPy's PyArrayObject. Its C API compiles this layout into other libraries, so that
/// it is the same in all releases. `is_laid_out_so` makes sure of it.
struct NumpyArray {
    PyObject head;
    char* data;
    int ndim;
    int64_t *shape, *strides;  // in bytes
    PyObject *base, *dtype;
    int flags;
};
static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));

class NumpyArrays final : public PlainArrays {
public:
    /// Both dtypes are NumPy's own objects: it has one of each.
    NumpyArrays(nb::object empty, nb::object single, nb::object half)
        : empty_(std::move(empty)), single_(std::move(single)), half_(std::move(half)) {}

    static bool is_laid_out_so(nb::handle sample) {
        if (nb::cast<size_t>(sample.type().attr("__basicsize__")) < sizeof(NumpyArray))
            return false;
        const auto* array = reinterpret_cast<const NumpyArray*>(sample.ptr());
        const nb::object shape = sample.attr("shape"), strides = sample.attr("strides");
        const size_t ndim = nb::len(shape);
        if (array->ndim != static_cast<int>(ndim)) return false;
        const nb::object dtype = sample.attr("dtype");
        if (array->dtype != dtype.ptr()) return false;
        const nb::object data = sample.attr("__array_interface__")["data"][0];
        if (reinterpret_cast<uintptr_t>(array->data) != nb::cast<uintptr_t>(data)) return false;
        for (size_t i = 0; i < ndim; ++i)
            if (array->shape[i] != nb::cast<int64_t>(shape[i]) ||
                array->strides[i] != nb::cast<int64_t>(strides[i]))
                return false;
        return true;
    }

    bool ready(const nb::handle (&)[3], const std::string&) const override { return true; }

    bool describe(nb::handle object, PlainTensor& plain) const override {
        const auto* array = reinterpret_cast<const NumpyArray*>(object.ptr());
        const bool single = array->dtype == single_.ptr();
        if (!single && array->dtype != half_.ptr()) return false;
        if (array->ndim > TensorView::max_ndim) return false;
        const int64_t bytes = single ? 4 : 2;
        for (int i = 0; i < array->ndim; ++i) {
            if (array->strides[i] % bytes != 0) return false;
            plain.strides[i] = array->strides[i] / bytes;
        }
        DLTensor& tensor = plain.tensor;
        tensor.data = array->data;
        tensor.device = {kDLCPU, 0};
        tensor.ndim = array->ndim;
        tensor.dtype = single ? float32 : float16;
        tensor.shape = array->shape;
        tensor.strides = plain.strides;
        tensor.byte_offset = 0;
        return true;
    }

    nb::object allocate(nb::handle, const DLTensor&, const TensorView& shape,
                        PlainTensor& written) const override {
        if (shape.dtype != DType::f32 && shape.dtype != DType::f16) return {};
        nb::object array = empty_(shape_tuple(shape), shape.dtype == DType::f32 ? single_ : half_);
        return describe(array, written) ? array : nb::object();
    }

private:
    nb::object empty_, single_, half_;
};

// ---- torch ---------------------------------------------------------------------------------------

class TorchTensors final : public PlainArrays {
public:
    /// `busy` are functions that return 0, False or None while nothing of the kind is at work;
    /// `forward_ad` is the module's dict.
    TorchTensors(const ExchangeApi* api, nb::object tensor, nb::object empty_like, nb::tuple busy,
                 nb::object is_grad_enabled, nb::dict forward_ad)
        : api_(api),
          empty_like_(std::move(empty_like)),
          new_empty_(tensor.attr("new_empty")),
          is_neg_(tensor.attr("is_neg")),
          requires_grad_(nb::str("requires_grad")),
          is_grad_enabled_(std::move(is_grad_enabled)),
          forward_ad_(std::move(forward_ad)),
          level_(nb::str("_current_level")) {
        for (const nb::handle one : busy) busy_.push_back(nb::borrow(one));
    }

    bool ready(const nb::handle (&tensors)[3], const std::string&) const override {
        for (const nb::object& busy : busy_)
            if (PyObject_IsTrue(ask(busy).ptr()) != 0) return false;
        if (is_true(ask(is_grad_enabled_)))
            for (const nb::handle tensor : tensors)
                if (is_true(tensor.attr(requires_grad_))) return false;
        PyObject* level = PyDict_GetItemWithError(forward_ad_.ptr(), level_.ptr());
        return level && PyLong_Check(level) && PyLong_AsLong(level) < 0;
    }

    bool describe(nb::handle object, PlainTensor& plain) const override {
        DLTensor& tensor = plain.tensor;
        if (!is_described(object, tensor)) return false;
        // Tensors that are all zeros, and those that torch.func wraps, have no address.
        if (tensor.device.device_type != kDLCPU || (!tensor.data && !is_empty(tensor)))
            return false;
        return tensor.strides && !is_true(is_neg_(object));
    }

    nb::object allocate(nb::handle like, const DLTensor& described, const TensorView& shape,
                        PlainTensor& written) const override {
        if (!has_dtype(described, shape.dtype)) return {};
        // empty_like takes half the time of new_empty.
        nb::object tensor =
            is_compact(described, shape) ? empty_like_(like) : new_empty_(like, shape_tuple(shape));
        return is_described(tensor, written.tensor) ? tensor : nb::object();
    }

private:
    bool is_described(nb::handle object, DLTensor& tensor) const {
        if (api_->describe(object.ptr(), &tensor) == 0) return true;
        PyErr_Clear();  // it has no memory; Python says why
        return false;
    }

    const ExchangeApi* api_;
    nb::object empty_like_, new_empty_, is_neg_, requires_grad_, is_grad_enabled_;
    nb::dict forward_ad_;
    nb::object level_;
    std::vector<nb::object> busy_;
};

// ---- MLX -----------------------------------------------------------------------------------------

/// The layout of DLManagedTensor in dlpack.h: what a capsule "dltensor" holds.
struct ManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

/// Memory that an MLX array will be made of, in DLPack's form.
struct HostMemory {
    ManagedTensor managed{};
    int64_t shape[TensorView::max_ndim];

    explicit HostMemory(const TensorView& view) {
        std::copy_n(view.shape, view.ndim, shape);
        const size_t bytes = static_cast<size_t>(view.size()) * (bits_of(view.dtype) / 8);
        DLTensor& tensor = managed.tensor;
        tensor.data = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
        if (!tensor.data) throw std::bad_alloc();
        tensor.device = {kDLCPU, 0};
        tensor.ndim = view.ndim;
        tensor.dtype = {static_cast<uint8_t>(view.dtype == DType::bf16 ? kDLBfloat : kDLFloat),
                        static_cast<uint8_t>(bits_of(view.dtype)), 1};
        tensor.shape = shape;
        managed.context = this;
        managed.deleter = [](ManagedTensor* own) { delete static_cast<HostMemory*>(own->context); };
    }
    ~HostMemory() { std::free(managed.tensor.data); }
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;
};

constexpr const char* capsule_name = "dltensor";

/// The tensor in a capsule that nobody has taken yet; null if it holds something else.
ManagedTensor* tensor_in(nb::handle capsule) {
    if (!PyCapsule_IsValid(capsule.ptr(), capsule_name)) return nullptr;
    return static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), capsule_name));
}

void free_untaken(PyObject* capsule) {
    if (ManagedTensor* managed = tensor_in(capsule)) managed->deleter(managed);
}

class MlxArrays final : public PlainArrays {
public:
    /// `compiled(*arrays)` sets `marks["mark"]` anew if it runs as Python: mlx traces them then.
    MlxArrays(nb::handle array, nb::handle mlx, nb::object compiled, nb::dict marks)
        : dlpack_(array.attr("__dlpack__")),
          eval_(mlx.attr("eval")),
          from_dlpack_(mlx.attr("from_dlpack")),
          host_(nb::make_tuple(int(kDLCPU), 0)),
          compiled_(std::move(compiled)),
          marks_(std::move(marks)),
          mark_(nb::str("mark")),
          has_metal_(nb::cast<bool>(mlx.attr("metal").attr("is_available")())) {}

    bool ready(const nb::handle (&arrays)[3], const std::string& backend) const override {
        if (has_metal_ && backend != "cpu") return false;
        // Owned: whoever sets another mark would free this one.
        const nb::object before = nb::borrow(PyDict_GetItemWithError(marks_.ptr(), mark_.ptr()));
        compiled_(arrays[0], arrays[1], arrays[2]);
        if (PyDict_GetItemWithError(marks_.ptr(), mark_.ptr()) != before.ptr()) return false;
        try {
            eval_(arrays[0], arrays[1], arrays[2]);
        } catch (nb::python_error&) {  // Python does the same once more, and explains it
            return false;
        }
        return true;
    }

    bool describe(nb::handle object, PlainTensor& plain) const override {
        plain.owner = dlpack_(object, "dl_device"_a = host_);
        const ManagedTensor* managed = tensor_in(plain.owner);
        if (managed) plain.tensor = managed->tensor;
        return managed != nullptr;
    }

    nb::object allocate(nb::handle, const DLTensor&, const TensorView& shape,
                        PlainTensor& written) const override {
        auto memory = std::make_unique<HostMemory>(shape);
        written.tensor = memory->managed.tensor;
        PyObject* capsule = PyCapsule_New(&memory->managed, capsule_name, free_untaken);
        if (!capsule) throw nb::python_error();
        memory.release();
        return nb::steal(capsule);
    }

    nb::object finish(nb::object allocated) const override { return from_dlpack_(allocated); }

private:
    nb::object dlpack_, eval_, from_dlpack_, host_, compiled_;
    nb::dict marks_;
    nb::object mark_;
    bool has_metal_;
};

// ---- registering ---------------------------------------------------------------------------------

/// By type. They live as long as the process: arrays may be passed until its end.
std::vector<std::pair<PyObject*, const PlainArrays*>>& all() {
    static auto* registered = new std::vector<std::pair<PyObject*, const PlainArrays*>>;
    return *registered;
}

void add(nb::handle type, std::unique_ptr<const PlainArrays> arrays) {
    Py_INCREF(type.ptr());
    all().emplace_back(type.ptr(), arrays.release());
}

bool plain_numpy(nb::handle sample, nb::object empty, nb::object single, nb::object half) {
    if (!NumpyArrays::is_laid_out_so(sample)) return false;
    add(sample.type(),
        std::make_unique<NumpyArrays>(std::move(empty), std::move(single), std::move(half)));
    return true;
}

bool plain_torch(nb::object tensor, nb::object empty_like, nb::tuple busy,
                 nb::object is_grad_enabled, nb::dict forward_ad) {
    const ExchangeApi* api = own_exchange_api(tensor);
    if (!api) return false;
    auto tensors =
        std::make_unique<TorchTensors>(api, tensor, std::move(empty_like), std::move(busy),
                                       std::move(is_grad_enabled), std::move(forward_ad));
    add(tensor, std::move(tensors));
    return true;
}

void plain_mlx(nb::object array, nb::object mlx, nb::object compiled, nb::dict marks) {
    add(array, std::make_unique<MlxArrays>(array, mlx, std::move(compiled), std::move(marks)));
}

}  // namespace

const PlainArrays* plain_arrays(nb::handle type) {
    for (const auto& [known, arrays] : all())
        if (known == type.ptr()) return arrays;
    return nullptr;
}

void bind_plain(nb::module_& m) {
    m.def("plain_numpy", &plain_numpy, "sample"_a, "empty"_a, "float32"_a, "float16"_a,
          nb::sig("def plain_numpy(sample: object, empty: "
                  "collections.abc.Callable[..., object], float32: object, float16: object) "
                  "-> bool"),
          "Lets `Repeated` read arrays of the sample's type without Python. False if this NumPy\n"
          "lays them out in another way; then it asks Python.");
    m.def("plain_torch", &plain_torch, "tensor"_a, "empty_like"_a, "busy"_a, "is_grad_enabled"_a,
          "forward_ad"_a,
          nb::sig("def plain_torch(tensor: type, empty_like: "
                  "collections.abc.Callable[..., object], "
                  "busy: tuple[collections.abc.Callable[[], object], ...], "
                  "is_grad_enabled: collections.abc.Callable[[], bool], "
                  "forward_ad: dict[str, typing.Any]) -> bool"),
          "The same of torch's tensors. Each of `busy` returns something true while a call may be\n"
          "more than its work. False if this torch lacks DLPack's C exchange API.");
    m.def("plain_mlx", &plain_mlx, "array"_a, "mlx"_a, "compiled"_a, "marks"_a,
          nb::sig("def plain_mlx(array: type, mlx: object, "
                  "compiled: collections.abc.Callable[..., object], "
                  "marks: dict[str, typing.Any]) -> None"),
          "The same of mlx's arrays. `compiled(*arrays)` sets marks['mark'] to a new object where\n"
          "mlx traces one of them.");
}

}  // namespace umfa::python
