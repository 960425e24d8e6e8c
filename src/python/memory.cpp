// Memory for frameworks whose own arrays cannot be written in place.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/dispatch.h"
#include "python/record.h"

namespace {

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

namespace umfa::python {
namespace {

using namespace nb::literals;
using AnyArray = nb::ndarray<nb::array_api>;

/// An MTLBuffer and its release function.
struct MetalMemory {
    MetalMemory(const Backend& backend, size_t bytes)
        : buffer(backend.allocate(bytes, "umfa._ext.empty")), deallocate(backend.deallocate) {}
    ~MetalMemory() { deallocate(buffer); }
    MetalMemory(const MetalMemory&) = delete;
    MetalMemory& operator=(const MetalMemory&) = delete;

    void* const buffer;
    void (*const deallocate)(void*);
};

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
                                   : dtype == "uint8"    ? nb::dtype<uint8_t>()
                                   : dtype == "int8"     ? nb::dtype<int8_t>()
                                                         : nb::dlpack::dtype{};
    if (type.bits == 0)
        fail(ErrorKind::internal, "umfa._ext.empty", "dtype is unknown", dtype,
             "float32, float16, bfloat16, uint8 or int8");
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

struct NamedType {
    const char* name;
    nb::dlpack::dtype type;
};

/// What frameworks name their dtypes, those that umfa refuses among them.
const NamedType types[] = {
    {"float32", nb::dtype<float>()},
    {"float16", nb::dtype<Float16>()},
    {"bfloat16", nb::dtype<BFloat16>()},
    {"float64", nb::dtype<double>()},
    {"bool", nb::dtype<bool>()},
    {"bool_", nb::dtype<bool>()},
    {"int8", nb::dtype<int8_t>()},
    {"int16", nb::dtype<int16_t>()},
    {"int32", nb::dtype<int32_t>()},
    {"int64", nb::dtype<int64_t>()},
    {"uint8", nb::dtype<uint8_t>()},
    {"uint16", nb::dtype<uint16_t>()},
    {"uint32", nb::dtype<uint32_t>()},
    {"uint64", nb::dtype<uint64_t>()},
    {"complex64", {static_cast<uint8_t>(nb::dlpack::dtype_code::Complex), 64, 1}},
};

/// A tensor on Metal as planners see it: its address stands for memory that there is not yet.
AnyArray outline(const std::vector<size_t>& shape, const std::string& dtype,
                 const std::vector<int64_t>& strides) {
    static std::atomic<uintptr_t> used{0};
    for (const NamedType& known : types)
        if (dtype == known.name)
            // An address of its own, so that no two seem to overlap.
            return AnyArray(reinterpret_cast<void*>(used += 4096), shape.size(), shape.data(),
                            nb::none(), strides.empty() ? nullptr : strides.data(), known.type,
                            nb::device::metal::value, 0);
    fail(ErrorKind::type, "umfa._ext.outline", "dtype is unknown", dtype, "one of a framework's");
}

}  // namespace

void bind_memory(nb::module_& m) {
    m.def("outline", &outline, "shape"_a, "dtype"_a, "strides"_a = std::vector<int64_t>(),
          nb::sig("def outline(shape: collections.abc.Sequence[int], dtype: str, "
                  "strides: collections.abc.Sequence[int] = []) -> typing.Any"),
          "A tensor on Metal without memory, for verdicts and for calls with `play`. Without\n"
          "strides, in elements, it is contiguous.\n\n"
          "Only its shape, dtype and layout may be used: whatever reads it ends the process.");
    m.def("empty", &empty, "shape"_a, "dtype"_a, "device"_a = "cpu",
          nb::sig("def empty(shape: collections.abc.Sequence[int], dtype: str, "
                  "device: str = 'cpu') -> typing.Any"),
          "An uninitialised array that speaks DLPack, on 'cpu' or 'metal'.");
    m.def("as_bfloat16", &as_bfloat16, "bits"_a, "owner"_a,
          nb::sig("def as_bfloat16(bits: object, owner: object) -> typing.Any"),
          "The same memory as a bfloat16 array that speaks DLPack; keeps `owner` alive.");
}

}  // namespace umfa::python
