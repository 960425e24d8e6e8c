// The Python door: DLPack in, exceptions out. Spelling only; the core checks and computes, and
// python/umfa/ decides what a tensor of each framework is.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

#include "core/checks.h"
#include "core/dispatch.h"
#include "core/dlpack_view.h"
#include "core/error.h"
#include "core/stats.h"
#include "cpu/features.h"
#include "cpu/isa/select.h"
#include "cpu/thread_pool.h"
#include "metal/shaders.h"
#include "python/door.h"
#include "umfa/umfa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace umfa;
using namespace umfa::python;

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

}  // namespace

namespace nanobind::detail {
template <>
struct dtype_traits<BFloat16> {
    static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Bfloat), 16, 1};
    static constexpr auto name = const_name("bfloat16");
};
template <>
struct dtype_traits<Float16> {
    static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Float), 16, 1};
    static constexpr auto name = const_name("float16");
};
}  // namespace nanobind::detail

namespace {

using AnyArray = nb::ndarray<nb::array_api>;

/// An MTLBuffer, and how to let go of it.
struct MetalMemory {
    MetalMemory(const Backend& backend, size_t bytes)
        : buffer(backend.allocate(bytes, "umfa._ext.empty")), deallocate(backend.deallocate) {}
    ~MetalMemory() { deallocate(buffer); }
    MetalMemory(const MetalMemory&) = delete;
    MetalMemory& operator=(const MetalMemory&) = delete;

    void* const buffer;
    void (*const deallocate)(void*);
};

/// Runs `body` with the GIL released.
///
/// Not nb::gil_scoped_release: when the interpreter is shutting down, CPython before 3.14 answers
/// a daemon thread that wants the GIL back with pthread_exit(), and unwinding through a destructor
/// or a noexcept frame ends the process with std::terminate. Such a thread waits here for the
/// process to end instead, which is what CPython 3.14 does.
template <class F>
void without_gil(F&& body) {
    PyThreadState* state = PyEval_SaveThread();
    std::exception_ptr error;
    try {
        body();
    } catch (...) {
        error = std::current_exception();
    }
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        for (;;) pause();
    }
    if (error) std::rethrow_exception(error);
}

nb::object shape_tuple(const TensorView& view) {
    const int64_t* n = view.shape;
    if (view.ndim == 4) return nb::make_tuple(n[0], n[1], n[2], n[3]);  // the usual one: no list
    nb::list sizes;
    for (int i = 0; i < view.ndim; ++i) sizes.append(n[i]);
    return nb::tuple(sizes);
}

nb::tuple attention_forward(const Options& options, nb::handle query, nb::handle key,
                            nb::handle value, nb::handle alibi_slopes, nb::handle attn_mask,
                            nb::callable allocate, nb::handle others) {
    Inputs inputs;
    Problem problem = Problem::make(
        make_request(options, query, key, value, alibi_slopes, attn_mask, others, inputs));
    const Backend& backend = route(problem, options.backend);

    // The façade allocates in the caller's framework, now that the shapes are known to be right.
    nb::object out = allocate(shape_tuple(problem.out_shape()), name_of(problem.query.view.dtype));
    nb::object lse = nb::none();
    Output out_array = import<nb::ndarray<>>(out[0], options.function, "out"), lse_array;
    problem.set_out(out_array.view);
    if (options.return_lse) {
        lse = allocate(shape_tuple(problem.lse_shape()), name_of(DType::f32));
        lse_array = import<nb::ndarray<>>(lse[0], options.function, "softmax_lse");
        problem.set_lse(lse_array.view);
    }
    without_gil([&] { forward(backend, problem); });
    return nb::make_tuple(out[1], lse.is_none() ? nb::object(lse) : nb::object(lse[1]));
}

std::pair<bool, std::string> attention_can_run(const Options& options, nb::handle query,
                                               nb::handle key, nb::handle value,
                                               nb::handle alibi_slopes, nb::handle attn_mask,
                                               nb::handle others) {
    Inputs inputs;
    const Verdict verdict =
        can_run(Problem::make(make_request(options, query, key, value, alibi_slopes, attn_mask,
                                           others, inputs)),
                options.backend);
    return {verdict.yes, verdict.reason};
}

void check_tensor(const std::string& function, const std::string& name, nb::handle tensor,
                  bool writable) {
    const TensorView view = writable ? import<nb::ndarray<>>(tensor, function, name).view
                                     : import<nb::ndarray<nb::ro>>(tensor, function, name).view;
    const Checker check{function};
    check_float_dtype(check, view, name);
    check_memory(check, view, name);
    if (writable) check_distinct(check, view, name);
}

/// Uninitialised memory for frameworks whose own arrays cannot be written in place: of the CPU, or
/// an MTLBuffer.
AnyArray empty(const std::vector<int64_t>& shape, const std::string& dtype,
               const std::string& device) {
    size_t count = 1;
    std::vector<size_t> sizes;
    for (const int64_t size : shape) {
        sizes.push_back(static_cast<size_t>(size));
        count *= static_cast<size_t>(size);
    }
    const nb::dlpack::dtype type = dtype == "float32"    ? nb::dtype<float>()
                                   : dtype == "float16"  ? nb::dtype<Float16>()
                                   : dtype == "bfloat16" ? nb::dtype<BFloat16>()
                                                         : nb::dlpack::dtype{};
    if (type.bits == 0)
        fail(ErrorKind::internal, "umfa._ext.empty", "dtype is unknown", dtype,
             "float32, float16 or bfloat16");
    if (device != "cpu" && device != "metal")
        fail(ErrorKind::internal, "umfa._ext.empty", "device is unknown", device, "cpu or metal");
    // 64-byte alignment lets XLA take the memory over without a copy.
    const size_t bytes = (count * (type.bits / 8u) + 64) / 64 * 64;
    if (device == "metal") {
        const Backend& backend = backend_of(Device::metal, "umfa._ext.empty");
        auto memory = std::make_unique<MetalMemory>(backend, bytes);
        nb::capsule owner(memory.get(),
                          [](void* p) noexcept { delete static_cast<MetalMemory*>(p); });
        void* buffer = memory.release()->buffer;
        return AnyArray(buffer, sizes.size(), sizes.data(), owner, nullptr, type,
                        nb::device::metal::value, 0);
    }
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    nb::capsule owner(memory, [](void* p) noexcept { std::free(p); });
    return AnyArray(memory, sizes.size(), sizes.data(), owner, nullptr, type);
}

/// numpy has no bfloat16 of its own and ml_dtypes arrays refuse DLPack: a uint16 view, relabelled.
AnyArray as_bfloat16(nb::ndarray<nb::ro> bits, nb::handle owner) {
    if (bits.dtype() != nb::dtype<uint16_t>())
        fail(ErrorKind::internal, "umfa._ext.as_bfloat16", "dtype is wrong", "another", "uint16");
    std::vector<size_t> shape;
    std::vector<int64_t> strides;
    for (size_t i = 0; i < bits.ndim(); ++i) {
        shape.push_back(bits.shape(i));
        strides.push_back(bits.stride(i));
    }
    return AnyArray(const_cast<void*>(static_cast<const void*>(bits.data())), shape.size(),
                    shape.data(), owner, strides.data(), nb::dtype<BFloat16>());
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
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
    m.doc() = "The Python door of libumfa. Private: use the functions of the package `umfa`.";

    const std::string name = nb::cast<std::string>(m.attr("__name__")) + ".UnsupportedError";
    unsupported_error = PyErr_NewExceptionWithDoc(
        name.c_str(), "What was asked for is sound, but umfa cannot do it (yet).",
        PyExc_NotImplementedError, nullptr);
    m.attr("UnsupportedError") = nb::handle(unsupported_error);
    nb::register_exception_translator(translate);

    nb::class_<Options>(m, "Options",
                        "The options of one attention call; types already normalised.")
        .def(
            "__init__",
            [](Options* self, std::string function,
               std::tuple<std::string, std::string, std::string> names, bool causal,
               std::optional<double> scale, int64_t left, int64_t right, double softcap,
               double dropout_p, bool return_lse, std::string backend, bool top_left,
               bool torch_shapes, bool grouped, int64_t attention_chunk,
               std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
               std::string lengths_name, bool rotary_interleaved, int64_t num_splits,
               uint64_t dropout_seed, uint64_t dropout_offset) {
                const Causal alignment = top_left ? Causal::top_left : Causal::bottom_right;
                new (self) Options{std::move(function),
                                   std::move(names),
                                   causal ? alignment : Causal::none,
                                   scale,
                                   left,
                                   right,
                                   softcap,
                                   dropout_p,
                                   return_lse,
                                   std::move(backend),
                                   torch_shapes ? Layout::bhsd : Layout::bshd,
                                   torch_shapes,
                                   grouped,
                                   attention_chunk,
                                   max_seqlen_q,
                                   max_seqlen_k,
                                   std::move(lengths_name),
                                   rotary_interleaved,
                                   num_splits,
                                   dropout_seed,
                                   dropout_offset};
            },
            "function"_a, "names"_a, nb::kw_only(), "causal"_a, "softmax_scale"_a.none(),
            "window_left"_a, "window_right"_a, "softcap"_a, "dropout_p"_a, "return_lse"_a,
            "backend"_a, "top_left"_a = false, "torch_shapes"_a = false, "grouped"_a = true,
            "attention_chunk"_a = 0, "max_seqlen_q"_a = nb::none(), "max_seqlen_k"_a = nb::none(),
            "lengths_name"_a = "seqused_k", "rotary_interleaved"_a = true, "num_splits"_a = 0,
            "dropout_seed"_a = 0, "dropout_offset"_a = 0);

    m.def("attention_forward", &attention_forward, "options"_a, "query"_a, "key"_a, "value"_a,
          "alibi_slopes"_a.none(), "attn_mask"_a.none(), "allocate"_a, "others"_a = nb::none(),
          nb::sig("def attention_forward(options: Options, query: object, key: object, "
                  "value: object, alibi_slopes: object | None, attn_mask: object | None, "
                  "allocate: collections.abc.Callable[[tuple[int, ...], str], "
                  "tuple[object, object]], others: dict[str, object] | None = None) "
                  "-> tuple[object, object | None]"),
          "Computes attention on tensors (batch, seqlen, nheads, head_dim), or with the option\n"
          "torch_shapes (..., nheads, seqlen, head_dim) that broadcast.\n\n"
          "`allocate(shape, dtype)` returns (DLPack tensor to write, what to hand back).\n"
          "Returns (out, lse or None) as allocate handed them back.");
    m.def("attention_can_run", &attention_can_run, "options"_a, "query"_a, "key"_a, "value"_a,
          "alibi_slopes"_a.none(), "attn_mask"_a.none(), "others"_a = nb::none(),
          nb::sig("def attention_can_run(options: Options, query: object, key: object, "
                  "value: object, alibi_slopes: object | None, attn_mask: object | None, "
                  "others: dict[str, object] | None = None) -> tuple[bool, str]"),
          "The routing's verdict on the same call, and its reason.");
    m.def("check_tensor", &check_tensor, "function"_a, "name"_a, "tensor"_a, "writable"_a = false,
          nb::sig("def check_tensor(function: str, name: str, tensor: object, "
                  "writable: bool = False) -> None"),
          "Raises what a call would about this tensor alone.");
    m.def("empty", &empty, "shape"_a, "dtype"_a, "device"_a = "cpu",
          nb::sig("def empty(shape: collections.abc.Sequence[int], dtype: str, "
                  "device: str = 'cpu') -> typing.Any"),
          "An uninitialised array that speaks DLPack, on 'cpu' or 'metal'.");
    m.def("as_bfloat16", &as_bfloat16, "bits"_a, "owner"_a,
          nb::sig("def as_bfloat16(bits: object, owner: object) -> typing.Any"),
          "The same memory as a bfloat16 array that speaks DLPack; keeps `owner` alive.");

    m.def("version", [] { return umfa_version(); }, "Version of libumfa.");
    m.def("compiler", &compiler, "The compiler that built this module.");
    m.def(
        "backend_name",
        [](const std::string& name) { return backend_name(name, "umfa._ext.backend_name"); },
        "name"_a, "The name, or what the environment makes of 'auto'.");
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
    m.def(
        "stats",
        [] {
            const Stats& counts = stats();
            nb::dict result;
            result["cpu_calls"] = counts.cpu_calls.load();
            result["metal_calls"] = counts.metal_calls.load();
            result["tensors_in_place"] = counts.tensors_in_place.load();
            result["tensors_copied"] = counts.tensors_copied.load();
            result["bytes_copied"] = counts.bytes_copied.load();
            result["pipelines"] = counts.pipelines.load();
            result["pipelines_from_text"] = counts.pipelines_from_text.load();
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
