// LaunchPlan: what the GPU is to do for one Problem, as a plain value. The planner writes it
// without a GPU in sight; executors play it (Metal, the emulator, PyTorch's and MLX's streams).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor_view.h"

namespace umfa::metal {

struct Size3 {
    uint32_t x = 1, y = 1, z = 1;
};

/// A constant of shared/constants.h with its value.
struct Constant {
    enum class Type : uint8_t { boolean, int32 };
    uint16_t index = 0;  // as a function constant
    Type type = Type::boolean;
    const char* name = nullptr;
    int32_t value = 0;
};

/// A tensor of the Problem that some launch uses.
struct PlanTensor {
    const char* name;  // the core's, by which an executor finds the caller's array
    TensorView view;
    bool read = true;      // before anything is written to it
    bool written = false;  // by the plan
};

/// What is at a buffer index of a kernel: an entry of the plan's tensors, scratch or data.
struct Binding {
    enum class Kind : uint8_t { tensor, scratch, data };
    uint32_t index = 0;
    Kind kind = Kind::tensor;
    uint32_t piece = 0;        // which entry
    uint64_t byte_offset = 0;  // from the first element of the tensor, or the start of the piece
};

struct KernelLaunch {
    std::string kernel;  // host_name in the library
    std::string source;  // file under shaders/ that holds it
    std::vector<std::pair<std::string, std::string>>
        macros;  // to compile just this kernel from text (kernel_text.h)
    std::vector<Constant> constants;
    std::vector<Binding> buffers;
    uint32_t buffer_count = 0;       // of the kernel's layout; not all of them need be bound
    uint32_t params_index = 0;       // buffer index of `params`
    std::vector<std::byte> params;   // bytes of the kernel's parameter struct
    Size3 grid;                      // in threadgroups
    Size3 threadgroup;               // in threads
    uint32_t threadgroup_bytes = 0;  // static threadgroup memory, for the limit check
    double seconds = 0;              // an estimate; 0 for launches that only move each byte once
    // A launch that may take too long is cut into slices: launches of parts of its grid. They write
    // apart from each other, so a further slice need not wait for those before it.
    Size3 origin{0, 0, 0};  // of the slice, in threadgroups; the parameters have it too
    bool further_slice = false;
};

/// Launches run in order, each seeing what the ones before it wrote; slices of one launch do not
/// see each other's.
struct LaunchPlan {
    std::vector<PlanTensor> tensors;
    std::vector<KernelLaunch> launches;
    std::vector<uint64_t> scratch_bytes;
    std::vector<std::vector<std::byte>> data;  // what kernels only read: tables, lists of tasks
};

}  // namespace umfa::metal
