#include "metal/plan_forward.h"

#include <cstring>
#include <iterator>

#include "core/error.h"
#include "metal/tiles.h"
#include "umfa/params.h"

namespace umfa::metal {
namespace {

// Buffer and function constant indices, as shaders/forward.metal declares them.
enum : uint32_t {
    buffer_query = 0,
    buffer_key = 1,
    buffer_value = 2,
    buffer_out = 3,
    buffer_lse = 4,
    buffer_mask = 5,
    buffer_slopes = 6,
    buffer_params = 7
};
enum : uint16_t {
    constant_has_lse = 0,
    constant_mask_kind = 1,
    constant_has_mask = 2,
    constant_has_alibi = 3,
    constant_has_softcap = 4,
    constant_scale_last = 5,
    constant_unit_channels = 6
};

struct Kernel {
    const char* storage;  // how the tensors' elements are spelled in MSL
    const char* operand;  // and those of the fragments
    const char* name;
    int operand_bytes;
};

Kernel kernel_of(DType dtype, const Capabilities& gpu) {
    switch (dtype) {
        case DType::f16: return {"half", "half", "f16", 2};
        case DType::bf16:
            if (gpu.native_bfloat()) return {"bfloat", "bfloat", "bf16", 2};
            return {"bfloat", "float", "bf16_as_f32", 4};
        default: return {"float", "float", "f32", 4};
    }
}

int kernel_head_dim(const Problem& problem) {
    const int64_t needed = std::max(problem.head_dim, problem.head_dim_v);
    for (int dim : forward_head_dims)
        if (dim >= needed) return dim;
    return 0;
}

template <size_t N>
ForwardTile pick(const ForwardTile (&table)[N], int head_dim) {
    for (const ForwardTile& tile : table)
        if (head_dim <= tile.head_dim) return tile;
    return table[N - 1];
}

ForwardTile tile_of(int head_dim, int operand_bytes, const Capabilities& gpu) {
    if (operand_bytes == 4) return pick(tiles_32bit, head_dim);
    return gpu.family >= Family::apple9 ? pick(tiles_16bit_apple9, head_dim)
                                        : pick(tiles_16bit_apple7, head_dim);
}

int mask_kind(const Problem& problem) {
    if (!problem.mask) return 0;
    switch (problem.mask->view.dtype) {
        case DType::b8: return 1;
        case DType::f32: return 2;
        case DType::f16: return 3;
        default: return 4;
    }
}

OperandStrides strides_of(const Operand& operand) {
    return {operand.stride_batch, operand.stride_head, operand.stride_row, operand.stride_channel};
}

template <class T>
std::vector<std::byte> bytes_of(const T& value) {
    std::vector<std::byte> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
}

}  // namespace

Verdict can_plan_forward(const Problem& problem) {
    if (kernel_head_dim(problem) == 0)
        return {false, "head_dim above " + std::to_string(*std::prev(std::end(forward_head_dims))) +
                           " has no kernel (head_dim=" +
                           std::to_string(std::max(problem.head_dim, problem.head_dim_v)) + ")"};
    return {};
}

LaunchPlan plan_forward(const Problem& problem, const Capabilities& gpu) {
    LaunchPlan plan;
    if (problem.batch * problem.nheads_q * problem.seqlen_q == 0) return plan;

    const Kernel kernel = kernel_of(problem.query.view.dtype, gpu);
    const int head_dim = kernel_head_dim(problem);
    const ForwardTile tile = tile_of(head_dim, kernel.operand_bytes, gpu);
    const int block_q = 8 * tile.fragments * tile.simdgroups;

    KernelLaunch launch;
    launch.kernel = std::string("forward_") + kernel.name + "_d" + std::to_string(head_dim) + "_k" +
                    std::to_string(tile.block_kv);
    launch.source = "forward.metal";
    launch.macros = {{"UMFA_KERNEL", "\"" + launch.kernel + "\""},
                     {"UMFA_T", kernel.storage},
                     {"UMFA_M", kernel.operand},
                     {"UMFA_D", std::to_string(head_dim)},
                     {"UMFA_BK", std::to_string(tile.block_kv)},
                     {"UMFA_QF", std::to_string(tile.fragments)},
                     {"UMFA_SIMDGROUPS", std::to_string(tile.simdgroups)}};

    const auto flag = [](bool value) { return value ? 1 : 0; };
    const bool scale_last =
        problem.softcap == 0 && !problem.alibi && !problem.mask && problem.softmax_scale > 0;
    const bool unit_channels =
        problem.query.stride_channel == 1 && problem.key.stride_channel == 1 &&
        problem.value.stride_channel == 1 && problem.out->stride_channel == 1;
    using Type = Constant::Type;
    launch.constants = {{constant_has_lse, Type::boolean, flag(problem.lse.has_value())},
                        {constant_mask_kind, Type::int32, mask_kind(problem)},
                        {constant_has_mask, Type::boolean, flag(problem.mask.has_value())},
                        {constant_has_alibi, Type::boolean, flag(problem.alibi.has_value())},
                        {constant_has_softcap, Type::boolean, flag(problem.softcap > 0)},
                        {constant_scale_last, Type::boolean, flag(scale_last)},
                        {constant_unit_channels, Type::boolean, flag(unit_channels)}};

    const auto bind = [&](uint32_t index, Binding::Source source, const TensorView& view) {
        launch.buffers.push_back({index, source, 0, view.byte_offset});
    };
    bind(buffer_query, Binding::Source::query, problem.query.view);
    bind(buffer_key, Binding::Source::key, problem.key.view);
    bind(buffer_value, Binding::Source::value, problem.value.view);
    bind(buffer_out, Binding::Source::out, problem.out->view);
    if (problem.lse) bind(buffer_lse, Binding::Source::lse, problem.lse->view);
    if (problem.mask) bind(buffer_mask, Binding::Source::mask, problem.mask->view);
    if (problem.alibi) bind(buffer_slopes, Binding::Source::alibi_slopes, problem.alibi->view);

    ForwardParams params{};
    params.query = strides_of(problem.query);
    params.key = strides_of(problem.key);
    params.value = strides_of(problem.value);
    params.out = strides_of(*problem.out);
    if (problem.lse) params.lse = strides_of(*problem.lse);
    if (problem.mask) {
        const int64_t* strides = problem.mask->view.strides;
        params.mask_batch = strides[0];
        params.mask_head = strides[1];
        params.mask_row = strides[2];
        params.mask_column = strides[3];
    }
    if (problem.alibi) {
        params.slopes_batch = problem.alibi->stride_batch;
        params.slopes_head = problem.alibi->stride_head;
    }
    params.seqlen_q = static_cast<int32_t>(problem.seqlen_q);
    params.seqlen_kv = static_cast<int32_t>(problem.seqlen_kv);
    params.head_dim = static_cast<int32_t>(problem.head_dim);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);
    params.group = static_cast<int32_t>(problem.nheads_q / problem.nheads_kv);
    params.offset = static_cast<int32_t>(problem.visible.offset);
    params.left = static_cast<int32_t>(problem.visible.left);
    params.right = static_cast<int32_t>(problem.visible.right);
    params.score_scale = static_cast<float>(problem.score_scale());
    params.softcap = static_cast<float>(problem.softcap_log2());
    launch.params_index = buffer_params;
    launch.params = bytes_of(params);

    launch.grid = {static_cast<uint32_t>((problem.seqlen_q + block_q - 1) / block_q),
                   static_cast<uint32_t>(problem.nheads_q), static_cast<uint32_t>(problem.batch)};
    launch.threadgroup = {static_cast<uint32_t>(32 * tile.simdgroups), 1, 1};
    launch.threadgroup_bytes =
        static_cast<uint32_t>(2 * tile.block_kv * (head_dim * kernel.operand_bytes + 16));
    plan.launches.push_back(std::move(launch));
    return plan;
}

}  // namespace umfa::metal
