#include "metal/launch_builder.h"

#include <cstddef>
#include <string_view>
#include <utility>

namespace umfa::metal {

Simdgroups fit_simdgroups(int usual, int smallest, const Capabilities& gpu) {
    int count = usual;
    while (count % 2 == 0 && count / 2 >= smallest &&
           32u * static_cast<uint32_t>(count) > gpu.max_threads)
        count /= 2;
    return {count, count == usual ? "" : "_s" + std::to_string(count)};
}

uint32_t add_scratch(LaunchPlan& plan, uint64_t bytes) {
    plan.scratch_bytes.push_back(bytes);
    return static_cast<uint32_t>(plan.scratch_bytes.size() - 1);
}

LaunchBuilder::LaunchBuilder(LaunchPlan& plan, std::string_view function,
                             std::vector<Constant> constants, std::string kernel,
                             const char* source, uint32_t buffer_count)
    : plan_(plan), function_(function) {
    launch_.macros = {{"UMFA_KERNEL", "\"" + kernel + "\""}};
    launch_.kernel = std::move(kernel);
    launch_.source = source;
    launch_.constants = std::move(constants);
    launch_.buffer_count = buffer_count;
}

LaunchBuilder& LaunchBuilder::macro(const char* name, std::string text) {
    launch_.macros.emplace_back(name, std::move(text));
    return *this;
}

LaunchBuilder& LaunchBuilder::constant(constant::Index index, int value) {
    launch_.constants[index].value = value;
    return *this;
}

LaunchBuilder& LaunchBuilder::tensors(std::span<const Slot> slots) {
    for (const Slot& slot : slots)
        for (uint32_t i = 0; i < plan_.tensors.size(); ++i)
            if (std::string_view(plan_.tensors[i].name) == slot.tensor)
                launch_.buffers.push_back({slot.index, Binding::Kind::tensor, i, 0});
    return *this;
}

LaunchBuilder& LaunchBuilder::scratch(uint32_t index, uint32_t piece) {
    launch_.buffers.push_back({index, Binding::Kind::scratch, piece, 0});
    return *this;
}

LaunchBuilder& LaunchBuilder::piece(uint32_t index, const std::optional<Binding>& what) {
    if (what) launch_.buffers.push_back({index, what->kind, what->piece, what->byte_offset});
    return *this;
}

LaunchBuilder& LaunchBuilder::data(uint32_t index, std::optional<uint32_t> piece) {
    if (piece) launch_.buffers.push_back({index, Binding::Kind::data, *piece, 0});
    return *this;
}

LaunchBuilder& LaunchBuilder::grid(int64_t x, int64_t y, int64_t z) {
    launch_.grid = {static_cast<uint32_t>(x), static_cast<uint32_t>(y), static_cast<uint32_t>(z)};
    return *this;
}

LaunchBuilder& LaunchBuilder::simdgroups(int count) {
    launch_.threadgroup = {static_cast<uint32_t>(32 * count), 1, 1};
    return *this;
}

LaunchBuilder& LaunchBuilder::threadgroup_bytes(int bytes) {
    launch_.threadgroup_bytes = static_cast<uint32_t>(bytes);
    return *this;
}

void LaunchBuilder::add() { plan_.launches.push_back(std::move(launch_)); }

void LaunchBuilder::add(const std::vector<GridSlice>& slices) {
    for (const GridSlice& slice : slices) {
        KernelLaunch launch = launch_;
        launch.further_slice = &slice != slices.data();
        launch.origin = slice.origin;
        launch.grid = slice.size;
        launch.seconds = slice.seconds;
        launch.constants[constant::is_slice].value = slices.size() > 1;
        const GridOrigin origin{slice.origin.x, slice.origin.y, slice.origin.z, 0};
        std::memcpy(launch.params.data() + offsetof(ForwardParams, origin), &origin, sizeof origin);
        plan_.launches.push_back(std::move(launch));
    }
}

}  // namespace umfa::metal
