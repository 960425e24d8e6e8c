// How the batch dimensions of a Problem become one, and what is left when they cannot.
#include <algorithm>
#include <functional>
#include <vector>

#include "core/parts.h"

namespace umfa {
namespace {

/// The batch dimensions, merged into the one that backends see (`walked`) and loops around it.
struct Merged {
    int64_t batch = 1;
    BatchLoop walked;
    std::vector<BatchLoop> loops;  // outermost first
};

/// The strides of batch dimension `i`. `results`: null for the strides of the inputs alone.
BatchLoop dimension(const Problem& problem, const ForwardResults* results, int i) {
    const int from_last = problem.ndim - i;  // in tensors with 3 dimensions behind the batch
    BatchLoop one;
    one.size = problem.batch_shape[i];
    one.index = 1;
    for (int inner = i + 1; inner < problem.ndim - 3; ++inner)
        one.index *= problem.batch_shape[inner];
    one.query = stride_at(problem.query.view, from_last);
    one.key = stride_at(problem.key.view, from_last);
    one.value = stride_at(problem.value.view, from_last);
    if (problem.mask) one.mask = stride_at(problem.mask->given, from_last);
    if (results) one.out = stride_at(results->out.view, from_last);
    if (results && results->lse) one.lse = stride_at(results->lse->view, from_last - 1);
    return one;
}

/// Whether the stride of `outer` is size * stride of `inner` in every tensor: they merge into one.
bool is_turn(const BatchLoop& outer, const BatchLoop& inner) {
    const auto turns = [&](int64_t BatchLoop::* stride) {
        int64_t turn = 0;
        return !__builtin_mul_overflow(inner.*stride, inner.size, &turn) && outer.*stride == turn;
    };
    return turns(&BatchLoop::query) && turns(&BatchLoop::key) && turns(&BatchLoop::value) &&
           turns(&BatchLoop::mask) && turns(&BatchLoop::out) && turns(&BatchLoop::lse);
}

Merged merged_batch(const Problem& problem, const ForwardResults* results) {
    Merged merged;
    if (problem.ndim <= 4) {  // at most one: the usual case, without memory for a list
        if (problem.ndim == 4) merged.walked = dimension(problem, results, 0);
        merged.batch = merged.walked.size;
        if (merged.batch <= 1) merged.walked = {};
        return merged;
    }
    std::vector<BatchLoop>& groups = merged.loops;
    for (int i = 0; i < problem.ndim - 3; ++i) {
        BatchLoop one = dimension(problem, results, i);
        merged.batch *= one.size;
        if (one.size == 1) continue;
        if (!groups.empty() && is_turn(groups.back(), one)) {
            one.size *= groups.back().size;
            groups.back() = one;
        } else {
            groups.push_back(one);
        }
    }
    if (merged.batch == 0) groups.clear();
    if (groups.empty()) return merged;
    // The longest becomes the batch that backends see, which gives the fewest parts.
    const auto longest =
        std::max_element(groups.begin(), groups.end(),
                         [](const BatchLoop& a, const BatchLoop& b) { return a.size < b.size; });
    merged.walked = *longest;
    groups.erase(longest);
    merged.batch = merged.walked.size;
    return merged;
}

void apply(Problem& problem, const Merged& merged) {
    problem.batch = merged.batch;
    problem.loops = merged.loops;
    problem.query.stride_batch = merged.walked.query;
    problem.key.stride_batch = merged.walked.key;
    problem.value.stride_batch = merged.walked.value;
    if (problem.mask) {
        problem.mask->view.shape[0] = merged.batch;
        problem.mask->view.strides[0] = merged.walked.mask;
    }
    if (problem.dropout) problem.dropout->batch_step = merged.walked.index;
}

void apply(ForwardResults& results, const Merged& merged) {
    results.out.stride_batch = merged.walked.out;
    if (results.lse) results.lse->stride_batch = merged.walked.lse;
}

/// Moves the views to part `index` of the loops.
void move_to(Problem& problem, ForwardResults& results, int64_t index) {
    for (size_t i = problem.loops.size(); i-- > 0; index /= problem.loops[i].size) {
        const BatchLoop& loop = problem.loops[i];
        const int64_t at = index % loop.size;
        advance(problem.query.view, at * loop.query);
        advance(problem.key.view, at * loop.key);
        advance(problem.value.view, at * loop.value);
        if (problem.mask) advance(problem.mask->view, at * loop.mask);
        if (problem.dropout) problem.dropout->batch_first += at * loop.index;
        advance(results.out.view, at * loop.out);
        if (results.lse) advance(results.lse->view, at * loop.lse);
    }
}

void set_dimension(TensorView& view, int i, int64_t size, int64_t stride) {
    view.shape[i] = stride == 0 && size > 0 ? 1 : size;
    view.strides[i] = stride;
}

/// Shrinks the operand's view to the part.
void narrow(Operand& operand, const Problem& problem, int64_t nheads, int64_t seqlen,
            int64_t channels) {
    TensorView& view = operand.view;
    view.ndim = 4;
    set_dimension(view, 0, problem.batch, operand.stride_batch);
    set_dimension(view, 4 - head_of(problem.layout), nheads, operand.stride_head);
    set_dimension(view, 4 - row_of(problem.layout), seqlen, operand.stride_row);
    set_dimension(view, 3, channels, operand.stride_channel);
}

void narrow_lse(Operand& lse, const Problem& problem) {
    TensorView& view = lse.view;
    view.ndim = 3;
    const int64_t sizes[] = {problem.batch, problem.nheads_q, problem.seqlen_q};
    const int64_t strides[] = {lse.stride_batch, lse.stride_head, lse.stride_row};
    std::copy_n(sizes, 3, view.shape);
    std::copy_n(strides, 3, view.strides);
}

void run_part(Problem problem, ForwardResults results, int64_t index,
              const std::function<void(const Problem&, const ForwardResults&)>& run) {
    move_to(problem, results, index);
    problem.loops.clear();
    problem.ndim = 4;
    problem.batch_shape[0] = problem.batch;
    narrow(problem.query, problem, problem.nheads_q, problem.seqlen_q, problem.head_dim);
    narrow(problem.key, problem, problem.nheads_kv, problem.seqlen_kv, problem.head_dim);
    narrow(problem.value, problem, problem.nheads_kv, problem.seqlen_kv, problem.head_dim_v);
    narrow(results.out, problem, problem.nheads_q, problem.seqlen_q, problem.head_dim_v);
    if (results.lse) narrow_lse(*results.lse, problem);
    if (problem.mask) {
        TensorView& given = problem.mask->given;
        given = problem.mask->view;
        for (int i = 0; i < 4; ++i)
            if (given.strides[i] == 0 && given.shape[i] > 0) given.shape[i] = 1;
    }
    run(problem, results);
}

}  // namespace

void merge_batch(Problem& problem) {
    if (problem.qv) problem.qv->stride_batch = stride_at(problem.qv->view, 4);  // of bshd
    if (!problem.sequences.given) {
        apply(problem, merged_batch(problem, nullptr));
        return;
    }
    // Each sequence has its own indices into the tensors.
    problem.batch = static_cast<int64_t>(problem.sequences.rows.size());
    for (Operand* operand : {&problem.query, &problem.key, &problem.value})
        operand->stride_batch = stride_at(operand->view, 4);
    if (problem.mask) {
        problem.mask->view.shape[0] = problem.batch;
        problem.mask->view.strides[0] = stride_at(problem.mask->given, 4);
    }
}

void for_each_part(const Problem& problem, const ForwardResults& results,
                   const std::function<void(const Problem&, const ForwardResults&)>& run) {
    if (problem.sequences.given) {
        run(problem, results);
        return;
    }
    const Merged merged = merged_batch(problem, &results);
    ForwardResults own = results;
    apply(own, merged);
    if (merged.loops.empty()) {  // then problem.loops is empty too
        run(problem, own);
        return;
    }
    Problem cut = problem;
    apply(cut, merged);
    int64_t parts = 1;
    for (const BatchLoop& loop : merged.loops) parts *= loop.size;
    for (int64_t i = 0; i < parts; ++i) run_part(cut, own, i, run);
}

}  // namespace umfa
