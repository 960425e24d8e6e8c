#include "metal/plan_quantize.h"

#include <algorithm>
#include <span>

#include "core/problem.h"
#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

// Of the rows of a block, one simdgroup reads so many numbers, or so many of a channel; more only where
// the pieces of one block would be too many to gather.
constexpr int64_t numbers_of_piece = 4096, rows_of_piece = 128, most_gathered = 16384;

constexpr Slot dequantize_layout[] = {
    {UMFA_DEQUANTIZE_DATA, "data"},
    {UMFA_DEQUANTIZE_SCALES, "scales"},
    {UMFA_DEQUANTIZE_OFFSETS, "offsets"},
    {UMFA_DEQUANTIZE_OUT, "out"},
};
constexpr Slot quantize_layout[] = {
    {UMFA_QUANTIZE_X, "x"},
    {UMFA_QUANTIZE_SCALES, "scales"},
    {UMFA_QUANTIZE_ZERO_POINTS, "zero_points"},
    {UMFA_QUANTIZE_DATA, "data"},
};
constexpr Slot scales_layout[] = {
    {UMFA_QUANTIZE_SCALES_X, "x"},
    {UMFA_QUANTIZE_SCALES_SCALES, "scales"},
    {UMFA_QUANTIZE_SCALES_ZERO_POINTS, "zero_points"},
    {UMFA_QUANTIZE_SCALES_FAULTS, "faults"},
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

QuantBlocks blocks_of(const QuantSizes& sizes) {
    const auto number = [](int64_t value) { return static_cast<int32_t>(value); };
    return {number(sizes.rows), number(sizes.channels),
            number(std::min(sizes.block_rows, std::max<int64_t>(1, sizes.rows))),
            number(sizes.block_channels)};
}

/// Rows of pieces, and how many there are in the rows of a block.
struct Pieces {
    int64_t rows, count;

    explicit Pieces(const QuantSizes& sizes) {
        const int64_t block_rows = std::min(sizes.block_rows, std::max<int64_t>(1, sizes.rows));
        const int64_t heads = sizes.one_block ? sizes.batch * sizes.heads : 1;
        rows = sizes.block_channels == 1
                   ? rows_of_piece
                   : std::max<int64_t>(1, numbers_of_piece / sizes.block_channels);
        rows = std::max(rows, divided_up(heads * block_rows, most_gathered));
        count = divided_up(block_rows, rows);
    }
};

QuantizeParams quantize_params(const QuantizeProblem& problem, const QuantizeResults& results,
                               const Pieces& pieces) {
    const QuantSizes& sizes = problem.sizes;
    QuantizeParams params{};
    params.x = strides_of(problem.x);
    params.scales = strides_of(results.scales);
    if (results.zero_points) params.zero_points = strides_of(*results.zero_points);
    params.data = strides_of(results.data);
    params.blocks = blocks_of(sizes);
    params.block_count = sizes.block_count();
    params.heads = static_cast<int32_t>(std::max<int64_t>(1, sizes.heads));
    params.row_blocks = static_cast<int32_t>(sizes.row_blocks());
    params.channel_blocks = static_cast<int32_t>(sizes.channel_blocks());
    params.piece_rows = static_cast<int32_t>(pieces.rows);
    params.pieces = static_cast<int32_t>(sizes.rows == 0 ? 0 : pieces.count);
    params.gathered =
        static_cast<int32_t>(params.pieces * (sizes.one_block ? sizes.batch * sizes.heads : 1));
    return params;
}

std::vector<Constant> constants_of(const QuantFormat& format, bool has_scales, bool has_offsets) {
    std::vector<Constant> constants = zero_constants();
    constants[constant::code_kind].value = format.codes();
    constants[constant::scale_kind].value = format.scale_kind();
    constants[constant::offset_kind].value = format.offset_kind();
    constants[constant::has_scales].value = has_scales;
    constants[constant::has_offsets].value = has_offsets;
    return constants;
}

/// Kernels count in 32 bits.
Verdict can_count(const QuantSizes& sizes) {
    if (sizes.rows > max_seqlen || sizes.channels > max_seqlen ||
        sizes.batch * sizes.heads > max_seqlen)
        return {false, "more than " + std::to_string(max_seqlen) +
                           " tokens, channels or heads are not implemented"};
    return {};
}

}  // namespace

Verdict can_plan_quantize(const QuantizeProblem& problem) { return can_count(problem.sizes); }
Verdict can_plan_dequantize(const DequantizeProblem& problem) {
    return can_count(problem.operand.sizes);
}

TensorView faults_view(const QuantizeProblem& problem, uint8_t* memory) {
    TensorView view;
    view.data = memory;
    view.dtype = DType::u8;
    view.ndim = 1;
    view.shape[0] = problem.sizes.block_count();
    view.strides[0] = 1;
    return view;
}

LaunchPlan plan_quantize(const QuantizeProblem& problem, const QuantizeResults& results,
                         const TensorView* faults, const Capabilities& gpu) {
    LaunchPlan plan;
    plan.tensors = {{"x", problem.x.view},
                    {"data", results.data.view, false, true},
                    {"scales", results.scales.view, false, true}};
    if (results.zero_points)
        plan.tensors.push_back({"zero_points", results.zero_points->view, false, true});
    if (faults) plan.tensors.push_back({"faults", *faults, false, true});
    const QuantSizes& sizes = problem.sizes;
    const int64_t heads = sizes.batch * sizes.heads, blocks = sizes.block_count();
    const bool has_numbers = heads * sizes.rows > 0;
    if (blocks == 0) return plan;

    const Pieces pieces(sizes);
    const QuantizeParams params = quantize_params(problem, results, pieces);
    const ElementType type = stored_type(problem.x.view.dtype);
    const int simdgroups = fit_simdgroups(4, 1, gpu).count;
    const bool gathers = sizes.one_block || pieces.count > 1;
    std::vector<Constant> constants =
        constants_of(problem.format, true, results.zero_points.has_value());
    constants[constant::has_faults].value = faults != nullptr;
    if (gathers)
        plan.scratch_bytes.push_back(sizeof(QuantRange) * static_cast<uint64_t>(std::max<int64_t>(
                                                              1, blocks * params.gathered)));
    const auto launch = [&](const char* kernel, const char* source, uint32_t buffers) {
        return LaunchBuilder(plan, problem.function, constants, std::string(kernel) + type.name,
                             source, buffers)
            .stores(type)
            .simdgroups(simdgroups);
    };
    if (has_numbers) {
        const int64_t across =
            sizes.block_channels == 1 ? divided_up(sizes.channels, 32) : sizes.channel_blocks();
        auto scales =
            launch("quantize_scales_", "quantize_scales.metal", UMFA_QUANTIZE_SCALES_BUFFERS);
        if (gathers)
            scales.constant(constant::has_ranges, true)
                .constant(constant::has_scales, false)
                .constant(constant::has_offsets, false)
                .constant(constant::has_faults, false)
                .tensor({UMFA_QUANTIZE_SCALES_X, "x"})
                .scratch(UMFA_QUANTIZE_SCALES_RANGES, 0);
        else
            scales.tensors(scales_layout);
        scales.macro("UMFA_OF", "umfa_quantize_scales")
            .params(UMFA_QUANTIZE_SCALES_PARAMS, params)
            .grid(divided_up(int64_t{params.row_blocks} * params.pieces, simdgroups), across, heads)
            .add();
    }
    if (gathers)
        launch("quantize_gathered_", "quantize_scales.metal", UMFA_QUANTIZE_SCALES_BUFFERS)
            .macro("UMFA_OF", "umfa_quantize_gathered")
            .scratch(UMFA_QUANTIZE_SCALES_RANGES, 0)
            .tensors(std::span(scales_layout).subspan(1))
            .params(UMFA_QUANTIZE_SCALES_PARAMS, params)
            .grid(divided_up(blocks, simdgroups), 1)
            .add();
    if (has_numbers)
        launch("quantize_", "quantize.metal", UMFA_QUANTIZE_BUFFERS)
            .tensors(quantize_layout)
            .params(UMFA_QUANTIZE_PARAMS, params)
            .grid(divided_up(sizes.rows, simdgroups), sizes.heads, sizes.batch)
            .add();
    return plan;
}

LaunchPlan plan_dequantize(const DequantizeProblem& problem, const DequantizeResults& results,
                           const Capabilities& gpu) {
    const QuantOperand& operand = problem.operand;
    const QuantSizes& sizes = operand.sizes;
    LaunchPlan plan;
    plan.tensors.push_back({"data", operand.data.view});
    if (operand.scales) plan.tensors.push_back({"scales", operand.scales->view});
    if (operand.offsets) plan.tensors.push_back({"offsets", operand.offsets->view});
    plan.tensors.push_back({"out", results.out.view, false, true});
    if (sizes.batch * sizes.heads * sizes.rows == 0) return plan;

    DequantizeParams params{};
    params.data = strides_of(operand.data);
    if (operand.scales) params.scales = strides_of(*operand.scales);
    if (operand.offsets) params.offsets = strides_of(*operand.offsets);
    params.out = strides_of(results.out);
    params.blocks = blocks_of(sizes);
    const ElementType type = stored_type(problem.out_dtype);
    const int simdgroups = fit_simdgroups(4, 1, gpu).count;
    LaunchBuilder(
        plan, problem.function,
        constants_of(operand.format, operand.scales.has_value(), operand.offsets.has_value()),
        std::string("dequantize_") + type.name, "dequantize.metal", UMFA_DEQUANTIZE_BUFFERS)
        .stores(type)
        .tensors(dequantize_layout)
        .params(UMFA_DEQUANTIZE_PARAMS, params)
        .grid(divided_up(sizes.rows, simdgroups), sizes.heads, sizes.batch)
        .simdgroups(simdgroups)
        .add();
    return plan;
}

}  // namespace umfa::metal
