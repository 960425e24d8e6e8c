// LaunchBuilder: one launch of a plan, step by step. A planner chooses a shape, builds, and adds.
#pragma once

#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/launch_plan.h"
#include "core/problem.h"
#include "metal/capabilities.h"
#include "metal/plan_parts.h"
#include "metal/slices.h"

namespace umfa::metal {

/// A tensor's place in a kernel's layout of buffers.
struct Slot {
    uint32_t index;
    const char* tensor;  // its name in the plan's table
};

/// Simdgroups of a threadgroup, as many as the pipeline takes.
struct Simdgroups {
    int count;
    std::string suffix;  // of the kernel's name: empty where they are as many as usual
};

/// `usual` simdgroups, or half of them and half again (down to `smallest`) while they are more
/// threads than the GPU's pipelines take. How many those are shows when a pipeline is built, since
/// they fall with the registers it needs: the executor then plans again.
Simdgroups fit_simdgroups(int usual, int smallest, const Capabilities& gpu);

/// "192, 128, 16, true": the values of template parameters, for a macro.
template <class... T>
std::string list_of(T... values) {
    std::string text;
    const auto append = [&](auto value) {
        if (!text.empty()) text += ", ";
        if constexpr (std::is_same_v<decltype(value), bool>)
            text += value ? "true" : "false";
        else
            text += std::to_string(value);
    };
    (append(values), ...);
    return text;
}

/// Adds data for kernels to read. Returns its number, for LaunchBuilder::data.
template <class T>
uint32_t add_data(LaunchPlan& plan, const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
    plan.data.emplace_back(bytes, bytes + values.size() * sizeof(T));
    return static_cast<uint32_t>(plan.data.size() - 1);
}

/// Adds memory that only the plan's kernels use. Returns its number, for LaunchBuilder::scratch.
uint32_t add_scratch(LaunchPlan& plan, uint64_t bytes);

class LaunchBuilder {
public:
    /// `source`: the kernel's file under shaders/. `buffer_count`: buffers in the kernel's layout.
    /// `function`: the public function, for messages; outlives this.
    LaunchBuilder(LaunchPlan& plan, std::string_view function, std::vector<Constant> constants,
                  std::string kernel, const char* source, uint32_t buffer_count);

    /// For the kernel's text, beside its name.
    LaunchBuilder& macro(const char* name, std::string text);
    /// The type of the tensors' elements, UMFA_T.
    LaunchBuilder& stores(const ElementType& type) { return macro("UMFA_T", type.storage); }
    /// And that of the fragments, UMFA_M.
    LaunchBuilder& computes(const ElementType& type) {
        return stores(type).macro("UMFA_M", type.operand);
    }
    /// The values of the other template parameters, UMFA_SHAPE.
    template <class... T>
    LaunchBuilder& shape(T... values) {
        return macro("UMFA_SHAPE", list_of(values...));
    }
    LaunchBuilder& constant(constant::Index index, int value);

    /// Binds those of the tensors that the problem has.
    LaunchBuilder& tensors(std::span<const Slot> slots);
    LaunchBuilder& tensor(Slot slot) { return tensors({&slot, 1}); }
    LaunchBuilder& scratch(uint32_t index, uint32_t piece);
    /// Binds nothing where there is none. The binding's own index does not matter.
    LaunchBuilder& piece(uint32_t index, const std::optional<Binding>& what);
    LaunchBuilder& data(uint32_t index, std::optional<uint32_t> piece);
    template <class T>
    LaunchBuilder& new_data(uint32_t index, const std::vector<T>& values) {
        return data(index, add_data(plan_, values));
    }
    template <class T>
    LaunchBuilder& params(uint32_t index, const T& value) {
        launch_.params_index = index;
        launch_.params.resize(sizeof value);
        std::memcpy(launch_.params.data(), &value, sizeof value);
        return *this;
    }
    LaunchBuilder& grid(int64_t x, int64_t y, int64_t z = 1);
    const Size3& grid() const { return launch_.grid; }
    LaunchBuilder& simdgroups(int count);
    LaunchBuilder& threadgroup_bytes(int bytes);

    /// Adds the launch to the plan, behind those that are there.
    void add();
    /// The same in slices. Requires that the parameters begin with ForwardParams.
    void add(const std::vector<GridSlice>& slices);

private:
    LaunchPlan& plan_;
    const std::string_view function_;
    KernelLaunch launch_;
};

}  // namespace umfa::metal
