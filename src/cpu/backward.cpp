// Backward pass on the CPU: cuts a problem into tasks for the kernel, and adds up what several tasks
// have computed.
#include "cpu/backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/backward_shared.h"
#include "cpu/float_environment.h"
#include "cpu/isa/select.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

constexpr int64_t queries_of_task = 256;  // where tasks cut the queries
constexpr int64_t statistics_step = 64;

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

/// The operand with strides in bytes.
Rows bytes_of(const Operand& operand) {
    Rows rows = rows_of(operand);
    const int64_t bytes = bits_of(operand.view.dtype) / 8;
    rows.stride_batch *= bytes;
    rows.stride_head *= bytes;
    rows.stride_row *= bytes;
    return rows;
}

/// A number in one of the gradient's types.
void store(const TensorView& view, int64_t element, float x) {
    char* at = view.address() + element * (bits_of(view.dtype) / 8);
    if (view.dtype == DType::f32) {
        std::memcpy(at, &x, sizeof x);
        return;
    }
    const uint16_t bits = view.dtype == DType::f16 ? half_from_float(x) : bfloat16_from_float(x);
    std::memcpy(at, &bits, sizeof bits);
}

bool all_bf16(const BackwardProblem& problem) {
    const Problem& forward = problem.forward;
    return forward.query.view.dtype == DType::bf16 && forward.key.view.dtype == DType::bf16 &&
           forward.value.view.dtype == DType::bf16 && problem.dout.view.dtype == DType::bf16;
}

/// One backward pass on one part of the batch.
class Backward {
public:
    Backward(const BackwardProblem& problem, const BackwardResults& results)
        : problem_(problem),
          forward_(problem.forward),
          results_(results),
          kernel_(backward_kernel(kernels(), all_bf16(problem))),
          sequences_(sequences_of(forward_)) {
        set_operands();
        set_options();
        set_statistics();
        block_ = kernel_.sizes(args_).key_block;
    }

    void run() {
        clear_unused();
        prepare();
        if (results_.sinks) write_sinks();
        if (results_.mask && !all_of_mask_is_written()) clear_mask();
        set_slopes();
        if (!run_shared_tasks()) {
            add_main_tasks();
            if (results_.mask && !mask_is_apart()) add_mask_tasks();
            run_tasks();
        }
        if (results_.alibi_slopes) write_slopes();
        if (results_.mask) write_mask_sums();
    }

private:
    void set_operands() {
        const auto set = [](const Operand& operand, Rows& rows, ElementType& type) {
            rows = bytes_of(operand);
            type = element_of(operand.view.dtype);
        };
        const auto set_if = [&](const std::optional<Operand>& operand, Rows& rows,
                                ElementType& type) {
            if (operand) set(*operand, rows, type);
        };
        set(forward_.query, args_.query, args_.types.query);
        set(forward_.key, args_.key, args_.types.key);
        set(forward_.value, args_.value, args_.types.value);
        if (forward_.qv) args_.qv = bytes_of(*forward_.qv);
        set(problem_.out, args_.out, args_.types.out);
        set(problem_.dout, args_.dout, args_.types.dout);
        set_if(results_.query, args_.dquery, args_.types.dquery);
        set_if(results_.key, args_.dkey, args_.types.dkey);
        set_if(results_.value, args_.dvalue, args_.types.dvalue);
        set_if(results_.qv, args_.dqv, args_.types.dqv);
        args_.lse = bytes_of(problem_.lse);
        if (problem_.dlse) args_.dlse = bytes_of(*problem_.dlse);
    }

    void set_options() {
        args_.sequences = sequences_.data();
        args_.group = forward_.nheads_kv > 0 ? forward_.nheads_q / forward_.nheads_kv : 1;
        args_.head_dim = forward_.head_dim;
        args_.head_dim_v = forward_.head_dim_v;
        if (forward_.mask) args_.mask = mask_of(*forward_.mask);
        if (forward_.rotary) args_.rotary = rotary_of(*forward_.rotary);
        args_.dropout.kept = 1;
        if (const auto& dropout = forward_.dropout)
            args_.dropout = {dropout->key, dropout->threshold, static_cast<float>(1 - dropout->p),
                             dropout->batch_first, dropout->batch_step};
        args_.score_scale = static_cast<float>(forward_.score_scale());
        args_.score_scale_low = static_cast<float>(forward_.score_scale() - args_.score_scale);
        args_.softcap = static_cast<float>(forward_.softcap_log2());
        args_.gradient_scale = static_cast<float>(forward_.softmax_scale);
        if (!forward_.alibi) return;
        args_.slopes = reinterpret_cast<const float*>(forward_.alibi->view.address());
        args_.slopes_stride_batch = forward_.alibi->stride_batch;
        args_.slopes_stride_head = forward_.alibi->stride_head;
    }

    void set_statistics() {
        int64_t rows = 0;
        for (const Sequence& sequence : sequences_) {
            first_row_.push_back(rows);
            rows += forward_.nheads_q * rounded_up(sequence.seqlen_q, statistics_step);
        }
        statistics_.resize(static_cast<size_t>(3 * rows));
        args_.pivot = statistics_.data();
        args_.pivot_low = args_.pivot + rows;
        args_.delta = args_.pivot_low + rows;
        args_.first_row = first_row_.data();
    }

    int64_t statistics_at(int64_t b, int64_t head) const {
        return first_row_[static_cast<size_t>(b)] +
               head * rounded_up(sequences_[static_cast<size_t>(b)].seqlen_q, statistics_step);
    }

    void prepare() const {
        const int64_t heads = forward_.nheads_q;
        const double floats =
            static_cast<double>(statistics_.size()) * static_cast<double>(forward_.head_dim_v);
        parallel_for(forward_.batch * heads, threads_worth(floats),
                     [&](int64_t i) { kernel_.prepare(args_, {i / heads, i % heads}); });
    }

    /// Zeros in rows that belong to no sequence: nothing else writes them.
    void clear_unused() const {
        if (!forward_.sequences.given) return;
        const auto clear = [](const std::optional<Operand>& operand, int64_t batch, int64_t heads,
                              int64_t rows, int64_t channels) {
            if (!operand) return;
            const int64_t bytes = bits_of(operand->view.dtype) / 8;
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t head = 0; head < heads; ++head) {
                        char* at = operand->view.address() + bytes * (b * operand->stride_batch +
                                                                      head * operand->stride_head +
                                                                      row * operand->stride_row);
                        for (int64_t c = 0; c < channels; ++c)
                            std::memset(at + c * bytes * operand->stride_channel, 0,
                                        static_cast<size_t>(bytes));
                    }
        };
        const auto batch_of = [](const Operand& operand) {
            return operand.view.ndim == 4 ? operand.view.shape[0] : 1;
        };
        const auto rows_in = [](const Operand& operand) {
            return operand.view.shape[operand.view.ndim - 3];  // of bshd
        };
        const Operand &query = forward_.query, &key = forward_.key;
        clear(results_.query, batch_of(query), forward_.nheads_q, rows_in(query),
              forward_.head_dim);
        clear(results_.qv, batch_of(query), forward_.nheads_q, rows_in(query), forward_.head_dim_v);
        clear(results_.key, batch_of(key), forward_.nheads_kv, rows_in(key), forward_.head_dim);
        clear(results_.value, batch_of(key), forward_.nheads_kv, rows_in(key), forward_.head_dim_v);
    }

    // ---- tasks -----------------------------------------------------------------------------------

    struct Task {
        BackwardTask work;
        double cost;
    };

    static double size_of_pair(const Sequence& sequence) {
        return static_cast<double>(sequence.seqlen_q) * static_cast<double>(sequence.seqlen_kv);
    }

    const SequenceHead* keep(std::vector<SequenceHead> heads) {
        heads_.push_back(std::move(heads));
        return heads_.back().data();
    }

    /// Time that the tasks of whole heads take, in units of the longest thread's pairs of query and
    /// key; the longest task goes first, to the thread that has least to do.
    static double makespan(std::vector<double> costs, int threads) {
        std::sort(costs.begin(), costs.end(), std::greater<>());
        std::priority_queue<double, std::vector<double>, std::greater<>> ends(
            std::greater<>(), std::vector<double>(static_cast<size_t>(threads), 0.0));
        double last = 0;
        for (const double cost : costs) {
            const double end = ends.top() + cost;
            ends.pop();
            ends.push(end);
            last = std::max(last, end);
        }
        return last;
    }

    bool wants_queries() const { return results_.query || results_.qv; }
    bool wants_keys() const { return results_.key || results_.value; }

    /// Pairs of query and key of each key head.
    std::vector<double> pairs_of_heads() const {
        std::vector<double> pairs;
        for (const Sequence& sequence : sequences_)
            pairs.insert(pairs.end(), static_cast<size_t>(forward_.nheads_kv),
                         static_cast<double>(args_.group) * size_of_pair(sequence));
        return pairs;
    }

    bool takes_whole_heads() const {
        const std::vector<double> pairs = pairs_of_heads();
        const double all = std::accumulate(pairs.begin(), pairs.end(), 0.0);
        const int threads = num_threads();
        return wants_queries() && wants_keys() && 5 * makespan(pairs, threads) <= 7 * all / threads;
    }

    void set_slopes() {
        for (const Sequence& sequence : sequences_)
            blocks_ = std::max(blocks_, (sequence.seqlen_kv + block_ - 1) / block_);
        if (results_.alibi_slopes)
            slopes_.assign(static_cast<size_t>(forward_.batch * forward_.nheads_q * blocks_), 0);
    }

    /// The tasks of all gradients but that of a mask that broadcasts.
    ///
    /// One task for all queries and keys of a key head computes five products. Two kinds of tasks,
    /// one with all queries of some keys and one with all keys of some queries, compute seven, but
    /// there are more of them. The bits are the same.
    void add_main_tasks() {
        const bool queries = wants_queries(), keys = wants_keys(), whole = takes_whole_heads();
        for (int64_t b = 0; b < forward_.batch; ++b)
            for (int64_t head = 0; head < forward_.nheads_kv; ++head) {
                std::vector<SequenceHead> own;
                for (int64_t i = 0; i < args_.group; ++i)
                    own.push_back({b, head * args_.group + i});
                const SequenceHead* heads = keep(std::move(own));
                const Sequence& sequence = sequences_[static_cast<size_t>(b)];
                if (whole)
                    add(heads, args_.group, 0, sequence.seqlen_q, 0, sequence.seqlen_kv, true,
                        true);
                else
                    add_cut(heads, sequence, queries, keys);
            }
    }

    void add_cut(const SequenceHead* heads, const Sequence& sequence, bool queries, bool keys) {
        if (keys || results_.alibi_slopes || mask_is_apart())
            for (int64_t key = 0; key < sequence.seqlen_kv; key += block_)
                add(heads, args_.group, 0, sequence.seqlen_q, key,
                    std::min(key + block_, sequence.seqlen_kv), false, keys);
        if (!queries) return;
        for (int64_t i = 0; i < args_.group; ++i)
            for (int64_t row = 0; row < sequence.seqlen_q; row += queries_of_task)
                add(heads + i, 1, row, std::min(row + queries_of_task, sequence.seqlen_q), 0,
                    sequence.seqlen_kv, true, false);
    }

    void add(const SequenceHead* heads, int64_t count, int64_t query_begin, int64_t query_end,
             int64_t key_begin, int64_t key_end, bool dquery, bool dkey) {
        BackwardTask task{};
        task.heads = heads;
        task.head_count = count;
        task.query_begin = query_begin;
        task.query_end = query_end;
        task.key_begin = key_begin;
        task.key_end = key_end;
        task.dquery = dquery;
        task.dkey = dkey;
        // Tasks that have all queries of their keys; others would add the same again.
        const bool sums = dkey || !dquery;
        if (sums && mask_is_apart()) task.dmask = mask_of(*results_.mask);
        if (sums && !slopes_.empty()) {
            task.dslopes =
                slopes_.data() + (heads->sequence * forward_.nheads_q + heads->head) * blocks_;
            task.dslopes_pitch = blocks_;
        }
        tasks_.push_back({task, static_cast<double>(count * (query_end - query_begin)) *
                                    static_cast<double>(key_end - key_begin) *
                                    (dquery && dkey ? 5
                                     : dkey         ? 4
                                                    : 3)});
    }

    // ---- the mask --------------------------------------------------------------------------------

    /// The time that tasks of the mask's own take, with the others, in the unit of makespan().
    double time_apart(double pairs, int threads) const {
        const std::vector<double> heads = pairs_of_heads();
        const bool whole = takes_whole_heads();
        const double products =
            2 + (whole ? 5 : (wants_queries() ? 3 : 0) + (wants_keys() ? 4 : 0));
        const int64_t* strides = results_.mask->view.strides;
        const auto pieces = [](int64_t length, int64_t step) {
            return static_cast<double>(std::max<int64_t>((length + step - 1) / step, 1));
        };
        const double tasks = pieces(strides[0] ? forward_.batch : 1, 1) *
                             pieces(strides[1] ? forward_.nheads_q : 1, 1) *
                             pieces(forward_.seqlen_q, queries_of_task) *
                             pieces(forward_.seqlen_kv, block_);
        const double longest = whole ? 5 * *std::max_element(heads.begin(), heads.end()) : 0;
        return std::max({products * pairs / threads, longest, 2 * pairs / tasks});
    }

    /// Computes all gradients together, if the mask's is summed over heads and that takes less time than
    /// tasks of its own. False if not. The bits are the same.
    bool run_shared_tasks() {
        const bool queries = wants_queries(), keys = wants_keys();
        if (!results_.mask || mask_is_apart() || !(queries || keys)) return false;
        BackwardTask common{};
        common.query_end = results_.mask->view.shape[2];
        common.key_end = results_.mask->view.shape[3];
        common.dquery = queries;
        common.dkey = keys;
        common.dmask = mask_of(*results_.mask);
        common.sums_mask = true;
        if (!common.dmask.stride_row || !common.dmask.stride_key) return false;
        if (common.query_end == 0 || common.key_end == 0) return false;
        if (forward_.batch == 0 || forward_.nheads_kv == 0) return false;
        if (!slopes_.empty()) {
            common.dslopes = slopes_.data();
            common.dslopes_pitch = blocks_;
        }
        const int threads = num_threads();
        SharedTasks tasks(args_, kernel_, common,
                          {forward_.batch, forward_.nheads_q, forward_.nheads_kv}, threads);
        const double products = 2 + (queries ? 1 : 0) + (keys ? 2 : 0);
        if (products * tasks.longest() >= time_apart(tasks.pairs(), threads)) return false;
        tasks.run(threads_worth(products * tasks.pairs() * static_cast<double>(forward_.head_dim)));
        return true;
    }

    /// Tasks for the gradient of a mask that broadcasts. One that has rows and columns is written as it is, summed
    /// over the heads that share it. The others are first kept for each head, in float32.
    void add_mask_tasks() {
        const DenseMask& mask = *results_.mask;
        const int64_t* strides = mask.view.strides;
        const bool rows = strides[2] != 0, keys = strides[3] != 0;
        const int64_t heads = forward_.nheads_q;
        if (rows && keys) {
            const int64_t own_batch = strides[0] ? forward_.batch : 1;
            const int64_t own_heads = strides[1] ? heads : 1;
            for (int64_t b = 0; b < own_batch; ++b)
                for (int64_t h = 0; h < own_heads; ++h) {
                    std::vector<SequenceHead> sharing;
                    for (int64_t i = b; i < (strides[0] ? b + 1 : forward_.batch); ++i)
                        for (int64_t j = h; j < (strides[1] ? h + 1 : heads); ++j)
                            sharing.push_back({i, j});
                    add_mask(std::move(sharing), mask_of(mask), true, true);
                }
            return;
        }
        mask_row_ = rows ? forward_.seqlen_q : 1;
        mask_key_ = keys ? forward_.seqlen_kv : 1;
        mask_terms_.assign(static_cast<size_t>(forward_.batch * heads * mask_row_ * mask_key_), 0);
        for (int64_t b = 0; b < forward_.batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                add_mask({{b, h}},
                         {mask_terms_.data(), heads * mask_row_ * mask_key_, mask_row_ * mask_key_,
                          rows ? mask_key_ : 0, keys ? 1 : 0, ElementType::f32},
                         rows, keys);
    }

    void add_mask(std::vector<SequenceHead> sharing, const Mask& mask, bool rows, bool keys) {
        int64_t last_query = 0, last_key = 0;
        for (const SequenceHead& one : sharing) {
            const Sequence& sequence = sequences_[static_cast<size_t>(one.sequence)];
            last_query = std::max(last_query, sequence.seqlen_q);
            last_key = std::max(last_key, sequence.seqlen_kv);
        }
        const int64_t count = static_cast<int64_t>(sharing.size());
        const SequenceHead* heads = keep(std::move(sharing));
        const int64_t row_step = rows ? queries_of_task : std::max<int64_t>(last_query, 1);
        const int64_t key_step = keys ? block_ : std::max<int64_t>(last_key, 1);
        for (int64_t row = 0; row < last_query; row += row_step)
            for (int64_t key = 0; key < last_key; key += key_step) {
                BackwardTask task{};
                task.heads = heads;
                task.head_count = count;
                task.query_begin = row;
                task.query_end = std::min(row + row_step, last_query);
                task.key_begin = key;
                task.key_end = std::min(key + key_step, last_key);
                task.dmask = mask;
                task.sums_mask = true;
                tasks_.push_back({task, 2.0 * static_cast<double>(count) *
                                            static_cast<double>(task.query_end - row) *
                                            static_cast<double>(task.key_end - key)});
            }
    }

    /// Whether each pair of query and key has an element of its own in the mask.
    bool mask_is_apart() const {
        if (!results_.mask) return false;
        const int64_t* strides = results_.mask->view.strides;
        return (strides[0] != 0 || forward_.batch == 1) &&
               (strides[1] != 0 || forward_.nheads_q == 1) && strides[2] != 0 && strides[3] != 0;
    }

    /// Whether every query sees every key, but for a dense mask.
    bool sees_all() const {
        const Visible<int64_t>& visible = forward_.visible;
        return !forward_.sequences.given && visible.left == UMFA_UNBOUNDED &&
               visible.right == UMFA_UNBOUNDED && visible.chunk == 0;
    }

    /// Whether tasks write every element of the mask's gradient.
    bool all_of_mask_is_written() const {
        const bool empty = forward_.batch == 0 || forward_.nheads_q == 0;
        return mask_is_apart() ? sees_all() : !forward_.sequences.given && !empty;
    }

    /// What is not seen keeps a gradient of 0.
    void clear_mask() const {
        const TensorView& given = results_.mask->given;
        if (given.size() == 0) return;
        int64_t dense = 1;  // the stride of a contiguous tensor
        bool contiguous = true;
        for (int i = given.ndim - 1; i >= 0; dense *= given.shape[i--])
            contiguous = contiguous && (given.shape[i] == 1 || given.strides[i] == dense);
        if (contiguous)
            std::memset(given.address(), 0,
                        static_cast<size_t>(dense) * static_cast<size_t>(bits_of(given.dtype) / 8));
        else
            for_each_element(given, [&](int64_t element) { store(given, element, 0); });
    }

    template <class F>
    static void for_each_element(const TensorView& view, F&& f) {
        int64_t index[TensorView::max_ndim] = {}, offset = 0;
        for (int i = view.ndim - 1; i >= 0;) {
            f(offset);
            for (i = view.ndim - 1; i >= 0; --i) {
                offset += view.strides[i];
                if (++index[i] < view.shape[i]) break;
                offset -= view.shape[i] * view.strides[i];
                index[i] = 0;
            }
        }
    }

    /// Adds up the terms of the heads that share an element.
    void write_mask_sums() const {
        if (mask_terms_.empty()) return;
        const DenseMask& mask = *results_.mask;
        const int64_t* strides = mask.view.strides;
        const int64_t heads = forward_.nheads_q;
        const int64_t own_batch = strides[0] ? forward_.batch : 1;
        const int64_t own_heads = strides[1] ? heads : 1;
        for (int64_t b = 0; b < own_batch; ++b)
            for (int64_t h = 0; h < own_heads; ++h)
                for (int64_t at = 0; at < mask_row_ * mask_key_; ++at) {
                    float sum = 0;
                    for (int64_t i = b; i < (strides[0] ? b + 1 : forward_.batch); ++i)
                        for (int64_t j = h; j < (strides[1] ? h + 1 : heads); ++j)
                            sum += mask_terms_[static_cast<size_t>(
                                (i * heads + j) * mask_row_ * mask_key_ + at)];
                    store(mask.view,
                          b * strides[0] + h * strides[1] + at / mask_key_ * strides[2] +
                              at % mask_key_ * strides[3],
                          sum);
                }
    }

    // ---- sums over rows --------------------------------------------------------------------------

    /// A sink has a probability, but no value: its gradient is -P * delta, summed over all rows.
    void write_sinks() const {
        const TensorView &sinks = forward_.sinks->logits, &written = results_.sinks->logits;
        parallel_for(forward_.nheads_q, 1, [&](int64_t head) {
            const double sink =
                float_at(sinks.address(), head * sinks.strides[0], sinks.dtype) * log2_e;
            double sum = 0;
            for (int64_t b = 0; b < forward_.batch; ++b) {
                const int64_t at = statistics_at(b, head);
                for (int64_t i = 0; i < sequences_[static_cast<size_t>(b)].seqlen_q; ++i) {
                    const double pivot = args_.pivot[at + i];
                    if (pivot == std::numeric_limits<double>::infinity()) continue;
                    sum -= std::exp2(sink - pivot - args_.pivot_low[at + i]) * args_.delta[at + i];
                }
            }
            store(written, head * written.strides[0], static_cast<float>(sum));
        });
    }

    void write_slopes() const {
        const umfa::Alibi& written = *results_.alibi_slopes;
        const bool by_batch = written.view.ndim == 2;
        for (int64_t b = 0; b < (by_batch ? forward_.batch : 1); ++b)
            for (int64_t head = 0; head < forward_.nheads_q; ++head) {
                double sum = 0;
                for (int64_t i = b; i < (by_batch ? b + 1 : forward_.batch); ++i)
                    for (int64_t block = 0; block < blocks_; ++block)
                        sum += slopes_[static_cast<size_t>(
                            (i * forward_.nheads_q + head) * blocks_ + block)];
                store(written.view, b * written.stride_batch + head * written.stride_head,
                      static_cast<float>(sum));
            }
    }

    void run_tasks() {
        std::stable_sort(tasks_.begin(), tasks_.end(),
                         [](const Task& a, const Task& b) { return a.cost > b.cost; });
        double cost = 0;
        for (const Task& task : tasks_) cost += task.cost;
        const int threads = threads_worth(cost * static_cast<double>(forward_.head_dim));
        parallel_for(static_cast<int64_t>(tasks_.size()), threads, [&](int64_t i) {
            const BackwardTask& task = tasks_[static_cast<size_t>(i)].work;
            kernel_.run(args_, task, thread_scratch(kernel_.scratch_floats(args_, task)));
        });
    }

    const BackwardProblem& problem_;
    const Problem& forward_;
    const BackwardResults& results_;
    const BackwardKernel& kernel_;
    const std::vector<Sequence> sequences_;
    BackwardArgs args_{};
    std::vector<float> statistics_;
    std::vector<int64_t> first_row_;
    std::vector<std::vector<SequenceHead>> heads_;
    std::vector<Task> tasks_;
    int64_t block_ = 0, blocks_ = 0;
    std::vector<float> slopes_;  // [sequence][head][block of keys]
    int64_t mask_row_ = 0, mask_key_ = 0;
    std::vector<float> mask_terms_;  // [sequence][head][row][key]
};

}  // namespace

void run_backward(const BackwardProblem& problem, const BackwardResults& results) {
    const DefaultFloatEnvironment environment;
    Backward(problem, results).run();
}

}  // namespace umfa::cpu
