// Forward pass on the CPU: cuts a Problem into blocks of queries and hands them to the kernels.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "cpu/arguments.h"
#include "cpu/backward.h"
#include "cpu/combine.h"
#include "cpu/decode.h"
#include "cpu/float_environment.h"
#include "cpu/isa/select.h"
#include "cpu/quantize.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

/// Query rows per task: as many as the kernel takes at a time, but every thread should get a few tasks.
/// Results do not depend on it.
int64_t block_q_of(const std::vector<Sequence>& sequences,
                   const std::vector<int64_t>& batch_indices, int64_t nheads, int64_t channels,
                   const ForwardKernel& kernel, int64_t lanes) {
    int64_t block = std::max<int64_t>(lanes, kernel.most_rows), longest = 0;
    while (block > lanes && block * channels > kernel.most_floats) block /= 2;
    const auto tasks = [&] {
        int64_t count = 0;
        for (const int64_t b : batch_indices)
            count += (sequences[static_cast<size_t>(b)].seqlen_q + block - 1) / block;
        return count * nheads;
    };
    for (const int64_t b : batch_indices)
        longest = std::max(longest, sequences[static_cast<size_t>(b)].seqlen_q);
    while (block > lanes && tasks() < int64_t{4} * num_threads()) block /= 2;
    return std::max(lanes, std::min(block, (longest + lanes - 1) / lanes * lanes));
}

Types types_of(const Problem& problem) {
    Types types{};
    types.query = element_of(problem.query.view.dtype);
    types.key = element_of(problem.key.view.dtype);
    types.value = element_of(problem.value.view.dtype);
    // Kernels write out the numbers of codes.
    if (problem.key_codes) types.key = ElementType::f32;
    if (problem.value_codes) types.value = ElementType::f32;
    types.out = element_of(problem.out_dtype);
    if (problem.append) {
        types.new_key = element_of(problem.append->key.view.dtype);
        types.new_value = element_of(problem.append->value.view.dtype);
    }
    return types;
}

ForwardArgs args_of(const Problem& problem, const ForwardResults& results,
                    const std::vector<Sequence>& sequences) {
    ForwardArgs args{};
    args.query = rows_of(problem.query);
    args.key = rows_of(problem.key);
    args.value = rows_of(problem.value);
    args.out = rows_of(results.out);
    if (problem.key_codes) {
        args.key_codes = codes_of(*problem.key_codes);
        args.key.stride_channel = 1;
    }
    if (problem.value_codes) {
        args.value_codes = codes_of(*problem.value_codes);
        args.value.stride_channel = 1;
    }
    if (problem.qv) args.qv = rows_of(*problem.qv);
    if (results.lse) args.lse = rows_of(*results.lse);
    args.sequences = sequences.data();
    args.page_size = problem.page_size;
    args.group = problem.nheads_kv > 0 ? problem.nheads_q / problem.nheads_kv : 1;
    args.head_dim = problem.head_dim;
    args.head_dim_v = problem.head_dim_v;
    if (problem.mask) args.mask = mask_of(*problem.mask);
    if (problem.rotary) args.rotary = rotary_of(*problem.rotary);
    if (const auto& added = problem.append)
        args.append = {rows_of(added->key), rows_of(added->value), problem.nheads_kv};
    args.dropout.kept = 1;
    if (const auto& dropout = problem.dropout)
        args.dropout = {dropout->key, dropout->threshold, static_cast<float>(1 - dropout->p),
                        dropout->batch_first, dropout->batch_step};
    args.types = types_of(problem);
    args.score_scale = static_cast<float>(problem.score_scale());
    args.score_scale_low = static_cast<float>(problem.score_scale() - args.score_scale);
    args.softcap = static_cast<float>(problem.softcap_log2());
    if (problem.alibi) {
        args.slopes = reinterpret_cast<const float*>(problem.alibi->view.address());
        args.slopes_stride_batch = problem.alibi->stride_batch;
        args.slopes_stride_head = problem.alibi->stride_head;
    }
    return args;
}

/// The arguments with strides in bytes, as `mixed` kernels take them.
ForwardArgs in_bytes(ForwardArgs args) {
    const auto scale = [](Rows& rows, ElementType type) {
        const int64_t bytes = type == ElementType::f32 ? 4 : 2;
        rows.stride_batch *= bytes;
        rows.stride_head *= bytes;
        rows.stride_row *= bytes;
    };
    scale(args.query, args.types.query);
    scale(args.qv, args.types.query);
    if (!args.key_codes.given) scale(args.key, args.types.key);
    if (!args.value_codes.given) scale(args.value, args.types.value);
    scale(args.out, args.types.out);
    scale(args.append.key, args.types.new_key);
    scale(args.append.value, args.types.new_value);
    return args;
}

std::vector<float> sinks_of(const Sinks& sinks, int64_t nheads) {
    std::vector<float> logits(static_cast<size_t>(nheads));
    for (int64_t h = 0; h < nheads; ++h)
        logits[static_cast<size_t>(h)] =
            float_at(sinks.logits.address(), h * sinks.logits.strides[0], sinks.logits.dtype) *
            static_cast<float>(log2_e);
    return logits;
}

void clear_unused(const Problem& problem, const ForwardArgs& args) {
    const int64_t bytes = bits_of(problem.out_dtype) / 8;
    const auto clear = [&](int64_t batch, int64_t head, int64_t row) {
        char* out = static_cast<char*>(args.out.data) +
                    bytes * (batch * args.out.stride_batch + head * args.out.stride_head +
                             row * args.out.stride_row);
        for (int64_t c = 0; c < problem.head_dim_v; ++c)
            std::memset(out + c * args.out.stride_channel * bytes, 0, size_t(bytes));
        if (args.lse.data)
            static_cast<float*>(
                args.lse.data)[batch * args.lse.stride_batch + head * args.lse.stride_head +
                               row * args.lse.stride_row] = -std::numeric_limits<float>::infinity();
    };
    for (const RowRange& range : problem.unused_rows())
        for (int64_t row = range.row; row < range.row + range.rows; ++row)
            for (int64_t head = 0; head < problem.nheads_q; ++head) clear(range.batch, head, row);
}

/// Writes the new rows of key and value behind those in use.
void append(const Problem& problem, const ForwardArgs& in_elements, const Kernels& set) {
    const DType dtype = problem.key.view.dtype;
    const bool one_dtype = problem.value.view.dtype == dtype &&
                           problem.append->key.view.dtype == dtype &&
                           problem.append->value.view.dtype == dtype;
    const ForwardArgs args = one_dtype ? in_elements : in_bytes(in_elements);
    const AppendRowFn append_row =
        (one_dtype ? kernels_for(set, dtype) : mixed_kernels(set)).append_row;
    std::vector<int64_t> ends;  // of each sequence's rows, in the order of tasks
    int64_t rows = 0;
    for (int64_t b = 0; b < problem.batch; ++b) ends.push_back(rows += args.sequences[b].new_rows);
    const double floats = static_cast<double>(rows * problem.nheads_kv) *
                          static_cast<double>(problem.head_dim + problem.head_dim_v);
    parallel_for(rows, threads_worth(floats), [&](int64_t task) {
        const auto end = std::upper_bound(ends.begin(), ends.end(), task);
        const int64_t b = end - ends.begin();
        append_row(args, b, task - (*end - args.sequences[b].new_rows));
    });
}

/// Runs the prefill kernel, a task for each block of queries and head. num_splits has no effect:
/// there are tasks enough without cutting the keys.
void run_prefill(const Problem& problem, ForwardArgs& args, const std::vector<Sequence>& sequences,
                 const ForwardKernel& kernel, const std::vector<int64_t>& batch_indices,
                 int lanes) {
    args.block_q = block_q_of(sequences, batch_indices, problem.nheads_q,
                              score_channels(problem) + problem.head_dim_v, kernel, lanes);
    std::vector<Block> tasks;
    double pairs = 0;
    for (const int64_t b : batch_indices) {
        const Sequence& sequence = sequences[static_cast<size_t>(b)];
        const int64_t blocks = (sequence.seqlen_q + args.block_q - 1) / args.block_q;
        pairs += static_cast<double>(problem.nheads_q * sequence.seqlen_q) *
                 static_cast<double>(sequence.seqlen_kv);
        // Under a causal mask the last blocks see the most keys: they go first, so that no thread
        // starts a long one when the others are done.
        for (int64_t head = 0; head < problem.nheads_q; ++head)
            for (int64_t i = 0; i < blocks; ++i)
                tasks.push_back({b, head, (problem.causal ? blocks - 1 - i : i) * args.block_q});
    }
    const int64_t scratch = kernel.scratch_floats(args);
    const int threads =
        threads_worth(pairs * static_cast<double>(score_channels(problem) + problem.head_dim_v));
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
        const size_t now = static_cast<size_t>(i), then = now + static_cast<size_t>(threads);
        kernel.run(args, tasks[now], then < tasks.size() ? &tasks[then] : nullptr,
                   thread_scratch(scratch));
    });
}

/// Numbers from one head's means to the next: whole cache lines.
int64_t means_pitch(const Problem& problem) { return (problem.head_dim + 15) / 16 * 16; }

/// Scores in int8. Few queries take the same way as many.
void run_int8(const Problem& problem, ForwardArgs& args, const std::vector<Sequence>& sequences,
              const Kernels& set, std::optional<DType> dtype) {
    const bool values = problem.quant_mode == QuantMode::int8;
    const Int8Kernel& kernel = int8_kernel(set, dtype, values);
    std::vector<int64_t> batch_indices;
    double keys = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
        if (sequences[static_cast<size_t>(b)].seqlen_q == 0) continue;
        batch_indices.push_back(b);
        keys += static_cast<double>(sequences[static_cast<size_t>(b)].seqlen_kv);
    }
    const int64_t heads = problem.nheads_kv;
    args.means_pitch = means_pitch(problem);
    args.heads_kv = heads;
    std::vector<float> means;
    if (problem.smooth_k) {
        means.resize(static_cast<size_t>(problem.batch * heads * args.means_pitch));
        const double operations =
            keys * static_cast<double>(heads) * static_cast<double>(problem.head_dim);
        parallel_for(static_cast<int64_t>(batch_indices.size()) * heads, threads_worth(operations),
                     [&](int64_t task) {
                         const int64_t b = batch_indices[static_cast<size_t>(task / heads)];
                         const int64_t head = task % heads;
                         kernel.key_means(args, b, head,
                                          means.data() + (b * heads + head) * args.means_pitch);
                     });
        args.key_means = means.data();
    }
    run_prefill(problem, args, sequences, values ? kernel.values : kernel.scores, batch_indices,
                set.lanes);
}

void run_forward(const Problem& problem, const ForwardResults& results) {
    if (problem.nheads_q == 0 && !problem.append) return;
    const DefaultFloatEnvironment environment;  // before the first constant is rounded
    const Kernels& set = kernels();
    const std::vector<Sequence> sequences = sequences_of(problem);
    ForwardArgs args = args_of(problem, results, sequences);
    std::vector<float> sinks;
    if (problem.sinks) {
        sinks = sinks_of(*problem.sinks, problem.nheads_q);
        args.sinks = sinks.data();
    }
    if (problem.append) append(problem, args, set);
    if (problem.nheads_q == 0) return;
    if (problem.sequences.given) clear_unused(problem, args);
    const bool mixed = !problem.one_dtype();
    const DtypeKernels& own =
        mixed ? mixed_kernels(set) : kernels_for(set, problem.query.view.dtype);
    if (mixed) args = in_bytes(args);
    if (problem.quant_mode != QuantMode::none) {
        const std::optional<DType> dtype =
            mixed ? std::nullopt : std::optional(problem.query.view.dtype);
        return run_int8(problem, args, sequences, set, dtype);
    }
    std::vector<int64_t> decode, prefill;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const Sequence& sequence = sequences[static_cast<size_t>(b)];
        // Each row of a panel is computed by itself; decoding splits the keys, which rounds otherwise.
        const bool few = !problem.batch_invariant && is_decode(sequence, set.lanes);
        if (sequence.seqlen_q > 0) (few ? decode : prefill).push_back(b);
    }
    if (!decode.empty()) run_decode(problem, args, own.decode, decode);
    if (!prefill.empty()) run_prefill(problem, args, sequences, own.forward, prefill, set.lanes);
}

constexpr uint32_t forward_features =
    bit(Feature::causal) | bit(Feature::window) | bit(Feature::softcap) | bit(Feature::alibi) |
    bit(Feature::lse) | bit(Feature::gqa) | bit(Feature::mask) | bit(Feature::sinks) |
    bit(Feature::varlen) | bit(Feature::paged_kv) | bit(Feature::attention_chunk) |
    bit(Feature::append) | bit(Feature::rotary) | bit(Feature::dropout) | bit(Feature::qv) |
    bit(Feature::quantized) | bit(Feature::quant_mode);

Verdict can_run_forward(const Problem& problem) {
    if (problem.quant_mode == QuantMode::none) return {};
    const std::string mode =
        std::string("with mode '") + quant_mode_names[static_cast<int>(problem.quant_mode)] + "', ";
    if (problem.qv) return {false, mode + "qv is not implemented"};
    if (problem.quant_mode == QuantMode::int8 && problem.dropout)
        return {false, mode + "dropout_p is not implemented"};
    if (problem.key_codes || problem.value_codes)
        return {false, mode + "a quantised key or value is not implemented"};
    return {};
}

Verdict available() {
    kernels();      // throws about UMFA_CPU_ISA
    num_threads();  // throws about UMFA_NUM_THREADS
    return {};
}

}  // namespace

const Backend backend{"cpu",
                      available,
                      [](Device device) { return device == Device::cpu; },
                      {forward_features, can_run_forward, run_forward},
                      {0, nullptr, run_combine},
                      {backward_features, nullptr, run_backward},
                      {0, nullptr, run_quantize},
                      {0, nullptr, run_dequantize}};

}  // namespace umfa::cpu
