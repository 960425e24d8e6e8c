// TensorView: a non-owning view of the caller's tensor, as every binding passes it to the core.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/export.h"

namespace umfa {

enum class Device : uint8_t { cpu, metal };

struct TensorView {
    static constexpr int max_ndim = 8;

    void* data = nullptr;      // cpu: address; metal: the id<MTLBuffer>. byte_offset not added.
    uint64_t byte_offset = 0;  // of element (0, ..., 0)
    int ndim = 0;
    int64_t shape[max_ndim] = {};
    int64_t strides[max_ndim] = {};  // in elements; may be 0 or negative
    DType dtype = DType::f32;
    Device device = Device::cpu;
    int device_id = 0;

    /// Address of element (0, ..., 0) of a CPU tensor.
    char* address() const { return static_cast<char*>(data) + byte_offset; }
    int64_t size() const {
        int64_t count = 1;
        for (int i = 0; i < ndim; ++i) count *= shape[i];
        return count;
    }
};

/// Lets the view start so many elements later in the same memory.
inline void advance(TensorView& view, int64_t elements) {
    if (view.size() == 0) return;
    const int64_t bytes = elements * (bits_of(view.dtype) / 8);
    if (view.device == Device::cpu)
        view.data = static_cast<char*>(view.data) + bytes;
    else
        view.byte_offset += static_cast<uint64_t>(bytes);
}

/// "(2, 16, 4, 64)"
UMFA_CORE_API std::string shape_text(const TensorView& view);
/// "cpu", "metal:0"
UMFA_CORE_API std::string device_text(const TensorView& view);

}  // namespace umfa
