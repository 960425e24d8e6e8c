// What every planner shares: how a Problem's tensors, options and numbers reach a kernel.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/problem.h"
#include "metal/capabilities.h"
#include "metal/launch_plan.h"
#include "shared/params.h"

namespace umfa::metal {

/// How a dtype is spelled in MSL, and in kernel names.
struct ElementType {
    const char* storage;  // of the tensors' elements
    const char* operand;  // of the fragments
    const char* name;
    int operand_bytes;
};
ElementType element_type(DType dtype, const Capabilities& gpu);

OperandStrides strides_of(const Operand& operand);
RotaryParams rotary_params(const Problem& problem);
DropoutParams dropout_params(const Problem& problem);
ForwardParams forward_params(const Problem& problem);

/// Whether the kernel may read K and V 16 bytes at a time.
bool wide_loads(const Problem& problem);

/// Adds the function constants of all headers.
void add_constants(KernelLaunch& launch, const Problem& problem);
void add_constant(KernelLaunch& launch, uint16_t index, bool value);
/// Changes one that is there.
void set_constant(KernelLaunch& launch, uint16_t index, bool value);
/// Binds query, key, value, and of mask, slopes, qv and rotary tables those there are.
void bind_inputs(KernelLaunch& launch, const Problem& problem);
/// Binds the caches and their new rows.
void bind_append(KernelLaunch& launch, const Problem& problem);
void bind_rotary(KernelLaunch& launch, const Problem& problem);
/// Binds out, and lse where it is there.
void bind_outputs(KernelLaunch& launch, const Problem& problem);
void bind_scratch(KernelLaunch& launch, uint32_t index, uint32_t piece);
void bind_data(KernelLaunch& launch, uint32_t index, uint32_t piece);
/// Binds the sinks where they are there: whoever divides by the sum takes them in.
void bind_sinks(KernelLaunch& launch, const Problem& problem);

/// Simdgroups of a threadgroup: `usual`, or half of them and half again (down to `smallest`) while
/// they are more threads than the GPU's pipelines take. How many those are shows when a pipeline is
/// built, since they fall with the registers it needs: the executor then plans again.
int fitting_simdgroups(int usual, int smallest, const Capabilities& gpu);
/// What the name of a kernel with fewer simdgroups than usual ends with; else nothing.
std::string fitted_suffix(int simdgroups, int usual);

template <class T>
void set_params(KernelLaunch& launch, uint32_t index, const T& value) {
    launch.params_index = index;
    launch.params.resize(sizeof value);
    std::memcpy(launch.params.data(), &value, sizeof value);
}

template <class T>
uint32_t add_data(LaunchPlan& plan, const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
    plan.data.emplace_back(bytes, bytes + values.size() * sizeof(T));
    return static_cast<uint32_t>(plan.data.size() - 1);
}

/// "192, 128, 16, true": the values of template parameters, for a macro.
template <class... T>
std::string list_of(T... values) {
    std::string text;
    const auto add = [&](auto value) {
        if (!text.empty()) text += ", ";
        if constexpr (std::is_same_v<decltype(value), bool>)
            text += value ? "true" : "false";
        else
            text += std::to_string(value);
    };
    (add(values), ...);
    return text;
}

}  // namespace umfa::metal
