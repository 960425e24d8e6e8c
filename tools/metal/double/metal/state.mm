// The settings of the double: the machine, the faults, the violations, and who computes.
#include <algorithm>
#include <atomic>
#include <cstdio>

#include "../doubles.h"

namespace metal_double {
namespace {

struct Fault {
    int32_t skip = 0, count = 0;
    int64_t value = 0;
};

std::mutex lock;
Machine current;
Fault faults[UMFA_FAULT_KINDS];
std::atomic<int64_t> counts[UMFA_COUNT_KINDS];
std::vector<std::string> found;
umfa_double_prepare_fn prepare_function = nullptr;
umfa_double_run_fn run_function = nullptr;

constexpr size_t error_capacity = 4096;

/// The plain C struct of a kernel, and the arrays it points to.
struct Described {
    explicit Described(const Kernel& kernel) {
        for (const auto& [index, constant] : kernel.constants) {
            indices.push_back(index);
            types.push_back(constant.type);
            constants.push_back(constant.value);
        }
        c.source = kernel.source.c_str();
        c.kernel = kernel.name.c_str();
        c.constant_count = static_cast<uint32_t>(indices.size());
        c.constant_indices = indices.data();
        c.constant_types = types.data();
        c.constant_values = constants.data();
    }
    std::vector<uint32_t> indices, types;
    std::vector<int32_t> constants;
    umfa_double_kernel c{};
};

}  // namespace

Machine machine() {
    const std::lock_guard guard(lock);
    return current;
}

bool fault(umfa_double_fault_kind kind, int64_t* value) {
    const std::lock_guard guard(lock);
    Fault& planned = faults[kind];
    if (planned.skip > 0) {
        --planned.skip;
        return false;
    }
    if (planned.count <= 0) return false;
    --planned.count;
    if (value) *value = planned.value;
    return true;
}

void count(umfa_double_count_kind kind) { ++counts[kind]; }

void violation(const std::string& text) {
    const std::lock_guard guard(lock);
    found.push_back(text);
}

bool prepare(const Kernel& kernel, uint64_t& static_bytes, std::string& error) {
    Described described(kernel);
    umfa_double_prepare_fn function;
    {
        const std::lock_guard guard(lock);
        function = prepare_function;
    }
    static_bytes = 0;
    if (!function) return true;
    std::vector<char> text(error_capacity);
    if (function(&described.c, &static_bytes, text.data(), text.size()) == 0) return true;
    error = text.data();
    return false;
}

bool run(Dispatch& dispatch, std::string& error) {
    Described described(dispatch.kernel);
    std::vector<umfa_double_buffer> buffers;
    for (auto& [index, binding] : dispatch.bindings) {
        if (binding.buffer)
            buffers.push_back(
                {index, 0, binding.buffer.contents, binding.buffer.length, binding.offset});
        else
            buffers.push_back({index, 1, binding.bytes.data(), binding.bytes.size(), 0});
    }
    described.c.buffers = buffers.data();
    described.c.buffer_count = static_cast<uint32_t>(buffers.size());
    const MTLSize sizes[] = {dispatch.groups, dispatch.threads};
    uint32_t* const targets[] = {described.c.threadgroups, described.c.threads};
    for (int i = 0; i < 2; ++i) {
        targets[i][0] = static_cast<uint32_t>(sizes[i].width);
        targets[i][1] = static_cast<uint32_t>(sizes[i].height);
        targets[i][2] = static_cast<uint32_t>(sizes[i].depth);
    }
    umfa_double_run_fn function;
    {
        const std::lock_guard guard(lock);
        function = run_function;
    }
    if (!function) {
        error = "no test has registered a GPU";
        return false;
    }
    std::vector<char> text(error_capacity);
    if (function(&described.c, text.data(), text.size()) == 0) return true;
    error = text.data();
    return false;
}

}  // namespace metal_double

using namespace metal_double;

extern "C" {

void umfa_double_set_machine(const umfa_double_machine* machine) {
    const std::lock_guard guard(lock);
    current.devices.clear();
    for (int32_t i = 0; i < machine->device_count; ++i) {
        const umfa_double_device& device = machine->devices[i];
        const uint64_t id = 4294967296 + static_cast<uint64_t>(i);
        current.devices.push_back(
            {device.name, device.architecture, device.family, device.unified != 0, id,
             device.driver, device.same_id != 0 ? id : id + 1000, device.cores_kind, device.cores});
    }
    current.listed = std::min(machine->listed, machine->device_count);
    current.usual = machine->usual;
    current.max_threads = machine->max_threads;
    current.shuffle = static_cast<uint32_t>(machine->shuffle);
}

void umfa_double_fault(int32_t kind, int32_t skip, int32_t count, int64_t value) {
    const std::lock_guard guard(lock);
    faults[kind] = {skip, count, value};
}

void umfa_double_clear_faults(void) {
    const std::lock_guard guard(lock);
    std::fill(std::begin(faults), std::end(faults), Fault{});
}

void umfa_double_set_gpu(umfa_double_prepare_fn prepare, umfa_double_run_fn run) {
    const std::lock_guard guard(lock);
    prepare_function = prepare;
    run_function = run;
}

int64_t umfa_double_count(int32_t kind) { return counts[kind].load(); }

int64_t umfa_double_violations(char* text, size_t capacity) {
    const std::lock_guard guard(lock);
    std::string all;
    for (const std::string& one : found) all += one + "\n";
    const auto count = static_cast<int64_t>(found.size());
    found.clear();
    if (text != nullptr && capacity > 0) std::snprintf(text, capacity, "%s", all.c_str());
    return count;
}
}
