#include "metal/self_test_cases.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "core/backend.h"
#include "core/constants.h"
#include "core/error.h"
#include "metal/kernel_families.h"
#include "metal/plan_backward.h"
#include "metal/plan_combine.h"
#include "metal/plan_forward.h"
#include "metal/plan_lanes.h"
#include "metal/plan_parts.h"
#include "metal/plan_quantize.h"
#include "metal/self_test_tensors.h"

namespace umfa::metal {
namespace {

const Function& function() {
    // Never destroyed: a test may run in a thread of its own while the process ends.
    static const auto* self_test = new Function("umfa.self_test");
    return *self_test;
}

// ---- the lane map ----------------------------------------------------------------------------------

/// Index in an 8x8 matrix of a lane's first element; its second is the next. Must match lane_map of
/// shaders/shared/fragment.h.
int64_t first_element_of(int64_t lane) {
    const int64_t four = lane / 4;
    const int64_t row = (four & 4) + lane / 2 % 4, column = (four & 2) * 2 + lane % 2 * 2;
    return 8 * row + column;
}

std::string look_at_lanes(DType dtype, const Runner& run) {
    SelfTestTensors tensors;
    const TensorView matrix = tensors.numbers(dtype, {8, 8}), held = tensors.unwritten(dtype, {64});
    run([&](const Capabilities&) { return plan_lanes(matrix, held); });
    const int64_t bytes = bits_of(dtype) / 8;
    for (int64_t i = 0; i < 64; ++i) {
        const int64_t element = first_element_of(i / 2) + i % 2;
        const char *has = held.address() + i * bytes, *at = matrix.address() + element * bytes;
        if (std::equal(has, has + bytes, at)) continue;
        return "lane " + std::to_string(i / 2) + " does not hold element (" +
               std::to_string(element / 8) + ", " + std::to_string(element % 8) +
               ") of an 8x8 matrix, as the kernels assume";
    }
    return {};
}

/// A tensor in a quantised format, in memory that a backend fills.
struct QuantizedNumbers {
    TensorView data, scales;
    std::optional<TensorView> zero_points;

    QuantizedNumbers(SelfTestTensors& tensors, const QuantizeProblem& problem) {
        const auto like = [&](const TensorView& shape) {
            return tensors.unwritten(shape.dtype, {shape.shape, shape.shape + shape.ndim});
        };
        data = like(problem.data_shape());
        scales = like(problem.scales_shape());
        if (const auto shape = problem.zero_points_shape()) zero_points = like(*shape);
    }
};

// ---- attention -------------------------------------------------------------------------------------

/// A case's problem with its tensors.
struct Attempt {
    using Extras = void (*)(SelfTestTensors&, AttentionRequest&);

    SelfTestTensors tensors;
    AttentionRequest request{function()};
    std::optional<Problem> problem;
    ForwardResults results;
    std::vector<std::pair<const char*, TensorView>> compared;
};

/// Sizes of a problem; the extras add to the request.
struct AttentionSizes {
    int64_t head_dim, head_dim_v, seqlen_q, seqlen_kv;
    Attempt::Extras extras = nullptr;
    int64_t nheads_q = 2;
    bool fills_cores = false;
};

std::unique_ptr<Attempt> attempt(DType dtype, const AttentionSizes& sizes) {
    constexpr int64_t nheads_kv = 1;
    auto own = std::make_unique<Attempt>();
    SelfTestTensors& tensors = own->tensors;
    AttentionRequest& request = own->request;
    request.query = tensors.numbers(dtype, {1, sizes.seqlen_q, sizes.nheads_q, sizes.head_dim});
    request.key = tensors.numbers(dtype, {1, sizes.seqlen_kv, nheads_kv, sizes.head_dim});
    request.value = tensors.numbers(dtype, {1, sizes.seqlen_kv, nheads_kv, sizes.head_dim_v});
    request.causal = true;
    request.return_lse = true;
    if (sizes.extras) sizes.extras(tensors, request);
    own->problem = Problem::make(request);
    const TensorView out = tensors.unwritten(own->problem->out_dtype,
                                             {1, sizes.seqlen_q, sizes.nheads_q, sizes.head_dim_v}),
                     lse = tensors.unwritten(DType::f32, {1, sizes.nheads_q, sizes.seqlen_q});
    own->results = own->problem->results(out, lse);
    own->compared = {{"out", out}, {"softmax_lse", lse}};
    if (request.new_key) {
        own->compared.emplace_back("key", *request.key);
        own->compared.emplace_back("value", *request.value);
    }
    return own;
}

void check_plan(const LaunchPlan& plan, const std::string& family) {
    for (const KernelLaunch& launch : plan.launches)
        for (const std::string& own : families_of(launch))
            if (own == family) return;
    fail(ErrorKind::internal, "umfa.self_test", "a case does not run what it is about", "others",
         family);
}

std::string attend(DType dtype, const AttentionSizes& sizes, const std::string& family,
                   const Runner& run) {
    const auto on_gpu = attempt(dtype, sizes), on_cpu = attempt(dtype, sizes);
    run([&](Capabilities gpu) {
        if (sizes.fills_cores) gpu.cores = 1;  // gets the tiles of large problems
        LaunchPlan plan = plan_forward(*on_gpu->problem, on_gpu->results, gpu);
        check_plan(plan, family);
        return plan;
    });
    cpu::backend.forward.run(*on_cpu->problem, on_cpu->results);
    for (size_t i = 0; i < on_gpu->compared.size(); ++i) {
        const auto& [name, got] = on_gpu->compared[i];
        std::string text = difference(name, got, on_cpu->compared[i].second);
        if (!text.empty()) return text;
    }
    return {};
}

void split(SelfTestTensors&, AttentionRequest& request) { request.num_splits = 3; }

void rotate(SelfTestTensors& tensors, AttentionRequest& request) {
    // The cosines and sines need not belong to angles.
    const int64_t rows = request.key->shape[1], pairs = request.key->shape[3] / 2;
    request.rotary_cos = tensors.numbers(DType::f32, {rows, pairs});
    request.rotary_sin = tensors.numbers(DType::f32, {rows, pairs});
    request.softmax_scale = 1.0 / 64;
}

void drop(SelfTestTensors&, AttentionRequest& request) {
    request.dropout_p = 0.25;
    request.dropout_seed = 20261129;
}

void change_scores(SelfTestTensors& tensors, AttentionRequest& request) {
    const TensorView &query = *request.query, &key = *request.key;
    request.attn_mask = tensors.numbers(DType::f32, {1, 1, query.shape[1], key.shape[1]});
    request.alibi_slopes = tensors.numbers(DType::f32, {query.shape[2]});
    request.learnable_sink = tensors.numbers(DType::f32, {query.shape[2]});
    request.softcap = 3;
}

/// A paged sequence whose pages are not in order.
void turn_pages(SelfTestTensors& tensors, AttentionRequest& request) {
    const auto pages_like = [&](const TensorView& rows) {
        return tensors.numbers(rows.dtype, {5, 16, rows.shape[2], rows.shape[3]});
    };
    request.key = pages_like(*request.key);
    request.value = pages_like(*request.value);
    request.seqused_k = tensors.table({75});
    TensorView pages = tensors.table({3, 0, 4, 1, 2});
    pages.ndim = 2;
    pages.shape[1] = pages.shape[0];
    pages.shape[0] = 1;
    pages.strides[0] = pages.shape[1];
    pages.strides[1] = 1;
    request.block_table = pages;
}

/// Tensors of different dtypes, for the float kernels.
void mix_dtypes(SelfTestTensors& tensors, AttentionRequest& request) {
    const auto numbers_like = [&](const TensorView& view, DType dtype) {
        return tensors.numbers(dtype, {view.shape, view.shape + view.ndim});
    };
    request.query = numbers_like(*request.query, DType::f16);
    request.key = numbers_like(*request.key, DType::bf16);
    request.out_dtype = DType::f16;
}

/// Keys of 8 bits, each token with a scale, and values of 4 bits, groups of 32 with zero points.
void quantize_cache(SelfTestTensors& tensors, AttentionRequest& request) {
    const auto quantize = [&](std::optional<TensorView>& x, const QuantChoice& choice,
                              std::optional<QuantFormat>& of_x, std::optional<TensorView>& scales,
                              std::optional<TensorView>& offsets) {
        QuantFormat format = QuantFormat::of(choice);
        const QuantizeProblem problem = QuantizeProblem::make({request.function->name, *x, format});
        const QuantizedNumbers numbers(tensors, problem);
        cpu::backend.quantize.run(
            problem, problem.results(numbers.data, numbers.scales, numbers.zero_points));
        format.channels = x->shape[3];
        x = numbers.data;
        of_x = format;
        scales = numbers.scales;
        offsets = numbers.zero_points;
    };
    // Of keys every dtype holds the numbers as they are, so that the CPU has the same scores.
    quantize(request.key, {QuantDType::mxfp8, {}, QuantOffset::none, {}, {}, {}},
             request.key_format, request.key_scales, request.key_offsets);
    quantize(
        request.value,
        {QuantDType::int4, Granularity::block, QuantOffset::zero_point, QuantScales::f16, 1, 32},
        request.value_format, request.value_scales, request.value_offsets);
}

/// No query is in use, so every row of out is cleared.
void clear(SelfTestTensors& tensors, AttentionRequest& request) {
    request.seqused_q = tensors.table({0});
}

void append(SelfTestTensors& tensors, AttentionRequest& request) {
    request.seqused_k = tensors.table({21});
    const auto rows_like = [&](const TensorView& cache) {
        return tensors.numbers(cache.dtype, {1, 11, cache.shape[2], cache.shape[3]});
    };
    request.new_key = rows_like(*request.key);
    request.new_value = rows_like(*request.value);
}

/// Sequences in pages whose tables a kernel reads, with splits that it chooses.
std::string attend_by_tables(DType dtype, const std::string& family, const Runner& run) {
    SelfTestTensors tensors;
    AttentionRequest request{function()};
    request.query = tensors.numbers(dtype, {1, 1, 2, 64});
    request.key = tensors.numbers(dtype, {1, 175, 1, 64});
    request.value = tensors.numbers(dtype, {1, 175, 1, 64});
    turn_pages(tensors, request);
    request.num_splits = 3;
    const Problem on_cpu = Problem::make(request);
    request.tables_in_stream = true;
    Problem on_gpu = Problem::make(request);
    const std::vector<int32_t> zeros(2 * UMFA_FAULT_WORDS, 0);
    const TensorView fault = tensors.table(zeros), nothing = tensors.table(zeros);
    on_gpu.sequences.tables->fault = fault.data;
    const TensorView got = tensors.unwritten(dtype, {1, 1, 2, 64}),
                     expected = tensors.unwritten(dtype, {1, 1, 2, 64});
    run([&](const Capabilities& gpu) {
        LaunchPlan plan = plan_forward(on_gpu, on_gpu.results(got), gpu);
        check_plan(plan, family);
        return plan;
    });
    cpu::backend.forward.run(on_cpu, on_cpu.results(expected));
    std::string text = difference("out", got, expected);
    return text.empty() ? byte_difference("table_fault", fault, nothing) : text;
}

// ---- gradients ---------------------------------------------------------------------------------------

/// Likewise of the gradients in `wanted`, from what the CPU's forward pass gives.
std::string differentiate(DType dtype, const AttentionSizes& sizes, uint32_t wanted,
                          const std::string& family, const Runner& run) {
    const auto call = attempt(dtype, sizes);
    cpu::backend.forward.run(*call->problem, call->results);
    SelfTestTensors& tensors = call->tensors;
    const TensorView& out = call->results.out.view;
    BackwardRequest request(call->request);
    request.out = out;
    request.lse = call->results.lse->view;
    request.dout = tensors.numbers(dtype, {out.shape, out.shape + out.ndim});
    request.wanted = wanted;
    const BackwardProblem problem = BackwardProblem::make(request);
    Gradients on_gpu, on_cpu;
    for (size_t i = 0; i < gradient_count; ++i) {
        if (!problem.wants(static_cast<Gradient>(i))) continue;
        const TensorView shape = problem.shape_of(static_cast<Gradient>(i));
        for (Gradients* gradients : {&on_gpu, &on_cpu})
            (*gradients)[i] =
                tensors.unwritten(shape.dtype, {shape.shape, shape.shape + shape.ndim});
    }
    const BackwardResults results = problem.results(on_gpu);
    run([&](const Capabilities& gpu) {
        LaunchPlan plan = plan_backward(problem, results, gpu);
        check_plan(plan, family);
        return plan;
    });
    // With a float32 dout no CPU multiplies rounded probabilities (avx512_bf16 would).
    request.dout = tensors.as_float32(*request.dout);
    const BackwardProblem exact = BackwardProblem::make(request);
    cpu::backend.backward.run(exact, exact.results(on_cpu));
    for (size_t i = 0; i < gradient_count; ++i) {
        if (!on_gpu[i]) continue;
        std::string text = difference(name_of(static_cast<Gradient>(i)), *on_gpu[i], *on_cpu[i]);
        if (!text.empty()) return text;
    }
    return {};
}

/// Rows that are not in use, and so belong to no sequence.
void use_part(SelfTestTensors& tensors, AttentionRequest& request) {
    request.seqused_q = tensors.table({61});
    request.seqused_k = tensors.table({70});
}

/// A mask that is added.
void add_bias(SelfTestTensors& tensors, AttentionRequest& request) {
    request.attn_mask =
        tensors.numbers(DType::f32, {1, 1, request.query->shape[1], request.key->shape[1]});
}

/// Sinks of the dtype of the query.
void attract(SelfTestTensors& tensors, AttentionRequest& request) {
    request.learnable_sink = tensors.numbers(request.query->dtype, {request.query->shape[2]});
}

constexpr uint32_t all_wanted = bit(Gradient::query) | bit(Gradient::key) | bit(Gradient::value);

/// Cases of the kernels of the backward pass.
void add_backward(std::vector<SelfTestCase>& cases, DType dtype, const std::string& operands,
                  const std::string& lanes) {
    const auto add = [&](std::string family, std::string needs, const AttentionSizes& sizes,
                         uint32_t wanted) {
        cases.push_back({family, std::move(needs), [=](const Runner& run) {
                             return differentiate(dtype, sizes, wanted, family, run);
                         }});
    };
    constexpr uint32_t dkv = bit(Gradient::key) | bit(Gradient::value);
    for (const int64_t d : {64, 128, 256, 576}) {
        const std::string of_shape = operands + "_d" + std::to_string(d);
        const int64_t dv = std::min<int64_t>(d, max_head_dim_v);
        add("dq_" + of_shape, lanes, {d, dv, 67, 75}, bit(Gradient::query));
        add("dkv_" + of_shape, lanes, {d, dv, 67, 75}, dkv);
        add("dmask_" + of_shape, lanes, {d, dv, 67, 75, add_bias}, bit(Gradient::mask));
    }
    const std::string needs = "dkv_" + operands + "_d64";
    add("backward_dropout_" + operands, needs, {64, 64, 67, 75, drop}, all_wanted);
    add("backward_rotary_" + operands, needs, {64, 64, 67, 75, rotate}, all_wanted);
    add("backward_scores_" + operands, needs, {64, 64, 67, 75, change_scores},
        all_wanted | bit(Gradient::alibi_slopes));
    add("backward_sequences_" + operands, needs, {64, 64, 67, 75, use_part}, all_wanted);
    if (dtype == DType::f32)
        add("backward_dtypes_" + operands, needs, {64, 64, 67, 75, mix_dtypes}, all_wanted);
    const std::string stored = stored_type(dtype).name;
    add("row_sums_" + stored, "delta_" + stored, {64, 64, 67, 75, attract}, bit(Gradient::sinks));
    // Its results are seen in dQ alone.
    add("delta_" + stored, "dq_" + operands + "_d64", {64, 64, 67, 75}, bit(Gradient::query));
}

// ---- merging -----------------------------------------------------------------------------------------

std::string merge_parts(DType dtype, const Runner& run) {
    SelfTestTensors tensors;
    const CombineRequest request{"umfa.self_test",
                                 tensors.numbers(dtype, {3, 1, 5, 2, 48}),
                                 tensors.numbers(DType::f32, {3, 1, 5, 2}),
                                 {},
                                 {}};
    const CombineProblem problem = CombineProblem::make(request);
    const auto unwritten = [&] {
        return problem.results(tensors.unwritten(dtype, {1, 5, 2, 48}),
                               tensors.unwritten(DType::f32, {1, 5, 2}));
    };
    const CombineResults on_gpu = unwritten(), on_cpu = unwritten();
    run([&](const Capabilities& gpu) { return plan_combine(problem, on_gpu, gpu); });
    cpu::backend.combine.run(problem, on_cpu);
    const std::string text = difference("out", on_gpu.out.view, on_cpu.out.view);
    return text.empty() ? difference("softmax_lse", on_gpu.lse.view, on_cpu.lse.view) : text;
}

// ---- quantising --------------------------------------------------------------------------------------

/// Formats with all kernels and with both kinds of arithmetic: integers and zero points, and floats.
constexpr QuantChoice quant_choices[] = {
    {QuantDType::int4, Granularity::tensor, QuantOffset::zero_point, QuantScales::f16, {}, {}},
    {QuantDType::e4m3, Granularity::block, QuantOffset::none, QuantScales::f32, 4, 32},
};

std::string quantize_numbers(DType dtype, const QuantChoice& choice, bool back, const Runner& run) {
    constexpr const char* name = "umfa.self_test";
    SelfTestTensors tensors;
    const TensorView x = tensors.numbers(dtype, {1, 37, 2, 75});
    QuantFormat format = QuantFormat::of(choice);
    const QuantizeProblem problem = QuantizeProblem::make({name, x, format});
    const QuantizedNumbers on_gpu(tensors, problem), on_cpu(tensors, problem);
    const auto results = [&](const QuantizedNumbers& own) {
        return problem.results(own.data, own.scales, own.zero_points);
    };
    cpu::backend.quantize.run(problem, results(on_cpu));
    if (!back) {
        const QuantizeResults written = results(on_gpu);
        run([&](const Capabilities& gpu) { return plan_quantize(problem, written, nullptr, gpu); });
        std::string text = byte_difference("scales", on_gpu.scales, on_cpu.scales);
        if (text.empty() && on_gpu.zero_points)
            text = byte_difference("zero_points", *on_gpu.zero_points, *on_cpu.zero_points);
        return text.empty() ? byte_difference("data", on_gpu.data, on_cpu.data) : text;
    }
    format.channels = x.shape[3];
    const DequantizeProblem reverse = DequantizeProblem::make(
        {name, on_cpu.data, {format, on_cpu.scales, on_cpu.zero_points}, Layout::bshd, dtype});
    const TensorView numbers = tensors.unwritten(dtype, {1, 37, 2, 75}),
                     expected = tensors.unwritten(dtype, {1, 37, 2, 75});
    const DequantizeResults written = reverse.results(numbers);
    run([&](const Capabilities& gpu) { return plan_dequantize(reverse, written, gpu); });
    cpu::backend.dequantize.run(reverse, reverse.results(expected));
    return byte_difference("out", numbers, expected);
}

/// The first fault in one of the formats; empty if there is none.
std::string quantize_formats(DType dtype, bool back, const Runner& run) {
    for (const QuantChoice& choice : quant_choices) {
        const std::string text = quantize_numbers(dtype, choice, back, run);
        if (!text.empty())
            return std::string(quant_dtype_names[static_cast<int>(choice.dtype)]) + ": " + text;
    }
    return {};
}

}  // namespace

std::vector<SelfTestCase> self_test_cases(DType dtype, const Capabilities& gpu) {
    const std::string operands = element_type(dtype, gpu).name, stored = stored_type(dtype).name;
    const DType matrices = matrix_dtype(dtype, gpu);
    std::vector<SelfTestCase> cases;
    const auto add = [&](std::string family, std::string needs, const AttentionSizes& sizes) {
        cases.push_back({family, std::move(needs),
                         [=](const Runner& run) { return attend(dtype, sizes, family, run); }});
    };
    cases.push_back({std::string("lanes_") + stored_type(matrices).name, "",
                     [=](const Runner& run) { return look_at_lanes(matrices, run); }});
    const std::string lanes = cases[0].family, forward = "forward_" + operands,
                      decode = "decode_" + operands;
    // More queries than four simdgroups take and more keys than a tile, both odd.
    add(forward + "_d64", lanes, {64, 64, 67, 75, nullptr, 2, true});
    add(forward + "_d128", lanes, {128, 128, 67, 75});
    add(forward + "_d256", lanes, {256, 256, 67, 75});
    add(forward + "_d576", lanes, {576, 512, 67, 75});
    add("packed_" + operands, forward + "_d576", {576, 512, 1, 75, split});
    add("rotary_" + operands, forward + "_d64", {64, 64, 67, 75, rotate});
    add("dropout_" + operands, forward + "_d64", {64, 64, 67, 75, drop});
    add("scores_" + operands, forward + "_d64", {64, 64, 67, 75, change_scores});
    add("sequences_" + operands, forward + "_d64", {64, 64, 67, 75, turn_pages});
    add("codes_" + operands, forward + "_d64", {64, 64, 67, 75, quantize_cache});
    if (dtype == DType::f32)
        add("dtypes_" + operands, forward + "_d64", {64, 64, 67, 75, mix_dtypes});
    add(decode + "_d128", lanes, {128, 128, 1, 75});
    add(decode + "_d256", lanes, {256, 256, 1, 75});
    add("decode_codes_" + operands, decode + "_d128", {128, 128, 1, 75, quantize_cache});
    add("decode_vector_" + operands + "_d128", "", {128, 128, 1, 75, nullptr, 1});
    add("decode_merge_" + stored, decode + "_d128", {128, 128, 1, 175, split});
    add("clear_" + stored, "", {64, 64, 5, 75, clear});
    // Without query heads only the append kernel is launched.
    add("append_" + stored, "", {64, 64, 1, 75, append, 0});
    cases.push_back({"tables", "decode_merge_" + stored,
                     [=](const Runner& run) { return attend_by_tables(dtype, "tables", run); }});
    cases.push_back(
        {"combine_" + stored, "", [=](const Runner& run) { return merge_parts(dtype, run); }});
    for (const bool back : {false, true})
        cases.push_back({(back ? "dequantize_" : "quantize_") + stored, "",
                         [=](const Runner& run) { return quantize_formats(dtype, back, run); }});
    add_backward(cases, dtype, operands, lanes);
    return cases;
}

}  // namespace umfa::metal
