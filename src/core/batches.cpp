// How the batch dimensions of a Problem become one, and what is left when they cannot.
#include <algorithm>
#include <functional>
#include <vector>

#include "core/backward.h"
#include "core/parts.h"

namespace umfa {
namespace {

/// A tensor with batch dimensions.
struct Walked {
    const TensorView* given;  // with all of them
    TensorView* view;         // what moves from part to part
    int64_t* stride_batch;
    int behind;  // dimensions behind the batch
};

/// The tensors of a problem that have batch dimensions, inputs first.
struct WalkedList {
    Walked list[BatchLoop::most_tensors];
    int count = 0;

    const Walked* begin() const { return list; }
    const Walked* end() const { return list + count; }
    void add(Operand& operand, int behind = 3) {
        list[count++] = {&operand.view, &operand.view, &operand.stride_batch, behind};
    }
    void add(std::optional<Operand>& operand, int behind = 3) {
        if (operand) add(*operand, behind);
    }
    void add(std::optional<DenseMask>& mask) {
        if (mask) list[count++] = {&mask->given, &mask->view, &mask->view.strides[0], 3};
    }
};

WalkedList walked(Problem& problem, ForwardResults* results) {
    WalkedList found;
    for (Operand* operand : {&problem.query, &problem.key, &problem.value}) found.add(*operand);
    found.add(problem.mask);
    if (!results) return found;
    found.add(results->out);
    found.add(results->lse, 2);
    return found;
}

WalkedList walked(BackwardProblem& problem, BackwardResults* results) {
    WalkedList found = walked(problem.forward, nullptr);
    found.add(problem.out);
    found.add(problem.lse, 2);
    found.add(problem.dout);
    found.add(problem.dlse, 2);
    found.add(results->query);
    found.add(results->key);
    found.add(results->value);
    found.add(results->mask);
    return found;
}

Problem& call_of(Problem& problem) { return problem; }
Problem& call_of(BackwardProblem& problem) { return problem.forward; }

/// The batch dimensions, merged into the one that backends see (`walked`) and loops around it.
struct Merged {
    int64_t batch = 1;
    BatchLoop walked;
    std::vector<BatchLoop> loops;  // outermost first
};

/// The strides of batch dimension `i`.
BatchLoop dimension(const Problem& problem, const WalkedList& tensors, int i) {
    BatchLoop one;
    one.size = problem.batch_shape[i];
    one.index = 1;
    for (int inner = i + 1; inner < problem.ndim - 3; ++inner)
        one.index *= problem.batch_shape[inner];
    int64_t* stride = one.strides;
    for (const Walked& tensor : tensors)
        *stride++ = stride_at(*tensor.given, problem.ndim - 3 - i + tensor.behind);
    return one;
}

/// Whether the stride of `outer` is size * stride of `inner` in every tensor: they merge into one.
bool is_turn(const BatchLoop& outer, const BatchLoop& inner) {
    for (int i = 0; i < BatchLoop::most_tensors; ++i) {
        int64_t turn = 0;
        if (__builtin_mul_overflow(inner.strides[i], inner.size, &turn) || outer.strides[i] != turn)
            return false;
    }
    return true;
}

Merged merged_batch(const Problem& problem, const WalkedList& tensors) {
    Merged merged;
    if (problem.ndim <= 4) {  // at most one: the usual case, without memory for a list
        if (problem.ndim == 4) merged.walked = dimension(problem, tensors, 0);
        merged.batch = merged.walked.size;
        if (merged.batch <= 1) merged.walked = {};
        return merged;
    }
    std::vector<BatchLoop>& groups = merged.loops;
    for (int i = 0; i < problem.ndim - 3; ++i) {
        BatchLoop one = dimension(problem, tensors, i);
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

/// `gradient`: where the results may have one of the mask.
void apply(Problem& problem, std::optional<DenseMask>* gradient, const WalkedList& tensors,
           const Merged& merged) {
    problem.batch = merged.batch;
    problem.loops = merged.loops;
    const int64_t* stride = merged.walked.strides;
    for (const Walked& tensor : tensors) *tensor.stride_batch = *stride++;
    if (problem.mask) problem.mask->view.shape[0] = merged.batch;
    if (gradient && *gradient) (*gradient)->view.shape[0] = merged.batch;
    if (problem.dropout) problem.dropout->batch_step = merged.walked.index;
}
std::optional<DenseMask>* mask_gradient(ForwardResults&) { return nullptr; }
std::optional<DenseMask>* mask_gradient(BackwardResults& results) { return &results.mask; }

/// Moves the views to part `index` of the loops.
void move_to(Problem& problem, const WalkedList& tensors, int64_t index) {
    for (size_t i = problem.loops.size(); i-- > 0; index /= problem.loops[i].size) {
        const BatchLoop& loop = problem.loops[i];
        const int64_t at = index % loop.size;
        const int64_t* stride = loop.strides;
        for (const Walked& tensor : tensors) advance(*tensor.view, at * *stride++);
        if (problem.dropout) problem.dropout->batch_first += at * loop.index;
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

void narrow_mask(std::optional<DenseMask>& mask) {
    if (!mask) return;
    TensorView& given = mask->given;
    given = mask->view;
    for (int i = 0; i < 4; ++i)
        if (given.strides[i] == 0 && given.shape[i] > 0) given.shape[i] = 1;
}

/// Shrinks all views to the part.
void narrow_all(Problem& problem) {
    problem.loops.clear();
    problem.ndim = 4;
    problem.batch_shape[0] = problem.batch;
    narrow(problem.query, problem, problem.nheads_q, problem.seqlen_q, problem.head_dim);
    narrow(problem.key, problem, problem.nheads_kv, problem.seqlen_kv, problem.head_dim);
    narrow(problem.value, problem, problem.nheads_kv, problem.seqlen_kv, problem.head_dim_v);
    narrow_mask(problem.mask);
}

void narrow_all(Problem& problem, ForwardResults& results) {
    narrow_all(problem);
    narrow(results.out, problem, problem.nheads_q, problem.seqlen_q, problem.head_dim_v);
    if (results.lse) narrow_lse(*results.lse, problem);
}

void narrow_all(BackwardProblem& problem, BackwardResults& results) {
    Problem& call = problem.forward;
    narrow_all(call);
    narrow(problem.out, call, call.nheads_q, call.seqlen_q, call.head_dim_v);
    narrow_lse(problem.lse, call);
    narrow(problem.dout, call, call.nheads_q, call.seqlen_q, call.head_dim_v);
    if (problem.dlse) narrow_lse(*problem.dlse, call);
    if (results.query) narrow(*results.query, call, call.nheads_q, call.seqlen_q, call.head_dim);
    if (results.key) narrow(*results.key, call, call.nheads_kv, call.seqlen_kv, call.head_dim);
    if (results.value)
        narrow(*results.value, call, call.nheads_kv, call.seqlen_kv, call.head_dim_v);
    narrow_mask(results.mask);
}

template <class P, class Results>
void run_part(P problem, Results results, int64_t index,
              const std::function<void(const P&, const Results&)>& run) {
    move_to(call_of(problem), walked(problem, &results), index);
    narrow_all(problem, results);
    run(problem, results);
}

int64_t count_of(const std::vector<BatchLoop>& loops) {
    int64_t parts = 1;
    for (const BatchLoop& loop : loops) parts *= loop.size;
    return parts;
}

/// Whether there is at most one batch dimension, whose strides the operands have.
bool is_one_part(const Problem& problem) { return problem.sequences.given || problem.ndim <= 4; }
bool is_one_part(const BackwardProblem& problem) { return is_one_part(problem.forward); }

template <class P, class Results>
void run_parts(const P& problem, const Results& results,
               const std::function<void(const P&, const Results&)>& run) {
    if (is_one_part(problem)) {  // the usual case, without copies
        run(problem, results);
        return;
    }
    P cut = problem;
    Results own = results;
    const WalkedList tensors = walked(cut, &own);
    const Merged merged = merged_batch(call_of(cut), tensors);
    apply(call_of(cut), mask_gradient(own), tensors, merged);
    if (merged.loops.empty()) {
        run(cut, own);
        return;
    }
    for (int64_t i = 0; i < count_of(merged.loops); ++i) run_part(cut, own, i, run);
}

}  // namespace

void merge_batch(Problem& problem) {
    if (problem.qv) problem.qv->stride_batch = stride_at(problem.qv->view, 4);  // of bshd
    if (!problem.sequences.given) {
        const WalkedList tensors = walked(problem, nullptr);
        apply(problem, nullptr, tensors, merged_batch(problem, tensors));
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
    run_parts(problem, results, run);
}

void for_each_part(const BackwardProblem& problem, const BackwardResults& results,
                   const std::function<void(const BackwardProblem&, const BackwardResults&)>& run) {
    run_parts(problem, results, run);
}

int64_t part_count(const BackwardProblem& problem, const BackwardResults& results) {
    if (is_one_part(problem)) return 1;
    BackwardProblem cut = problem;
    BackwardResults own = results;
    return count_of(merged_batch(cut.forward, walked(cut, &own)).loops);
}

}  // namespace umfa
