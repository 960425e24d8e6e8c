// How the batch dimensions of a Problem become one, and what is left when they cannot.
#include <algorithm>

#include "core/parts.h"

namespace umfa {

/// Finds `batch` and `loops` for the operands that are there. Neighbouring batch dimensions are one
/// where, in every operand, a step of the outer is a whole turn of the inner.
void Problem::merge_batch() {
    if (sequences.given) {  // each says itself which index of which tensor it is
        batch = static_cast<int64_t>(sequences.rows.size());
        query.stride_batch = stride_at(query.view, 4);
        key.stride_batch = stride_at(key.view, 4);
        value.stride_batch = stride_at(value.view, 4);
        if (qv) qv->stride_batch = stride_at(qv->view, 4);
        if (mask) {
            mask->view.shape[0] = batch;
            mask->view.strides[0] = stride_at(mask->given, 4);
        }
        if (out) out->stride_batch = stride_at(out->view, 4);
        if (lse) lse->stride_batch = stride_at(lse->view, 3);
        return;
    }
    if (qv) qv->stride_batch = stride_at(qv->view, 4);  // of bshd, whose batch is one dimension
    std::vector<BatchLoop> groups;
    batch = 1;
    for (int i = 0; i < ndim - 3; ++i) {
        const int from_last = ndim - i;  // in tensors with 3 dimensions behind the batch
        BatchLoop one;
        one.size = batch_shape[i];
        one.index = 1;
        for (int inner = i + 1; inner < ndim - 3; ++inner) one.index *= batch_shape[inner];
        one.query = stride_at(query.view, from_last);
        one.key = stride_at(key.view, from_last);
        one.value = stride_at(value.view, from_last);
        if (mask) one.mask = stride_at(mask->given, from_last);
        if (out) one.out = stride_at(out->view, from_last);
        if (lse) one.lse = stride_at(lse->view, from_last - 1);
        batch *= one.size;
        if (one.size == 1) continue;
        const auto turns = [&](int64_t BatchLoop::* stride) {
            int64_t turn = 0;
            return !__builtin_mul_overflow(one.*stride, one.size, &turn) &&
                   groups.back().*stride == turn;
        };
        if (!groups.empty() && turns(&BatchLoop::query) && turns(&BatchLoop::key) &&
            turns(&BatchLoop::value) && turns(&BatchLoop::mask) && turns(&BatchLoop::out) &&
            turns(&BatchLoop::lse)) {
            one.size *= groups.back().size;
            groups.back() = one;
        } else {
            groups.push_back(one);
        }
    }
    // The longest is the batch that backends see: the fewest problems.
    BatchLoop walked;
    if (!groups.empty() && batch != 0) {
        const auto longest = std::max_element(
            groups.begin(), groups.end(),
            [](const BatchLoop& a, const BatchLoop& b) { return a.size < b.size; });
        walked = *longest;
        groups.erase(longest);
        batch = walked.size;
    }
    loops = batch == 0 ? std::vector<BatchLoop>() : std::move(groups);
    query.stride_batch = walked.query;
    key.stride_batch = walked.key;
    value.stride_batch = walked.value;
    if (out) out->stride_batch = walked.out;
    if (lse) lse->stride_batch = walked.lse;
    if (mask) {
        mask->view.shape[0] = batch;
        mask->view.strides[0] = walked.mask;
    }
    if (dropout) dropout->batch_step = walked.index;
}

int64_t Problem::slices() const {
    int64_t count = 1;
    for (const BatchLoop& loop : loops) count *= loop.size;
    return count;
}

Problem Problem::slice(int64_t index) const {
    Problem one = *this;
    one.loops.clear();
    one.ndim = 4;
    one.batch_shape[0] = batch;
    for (size_t i = loops.size(); i-- > 0; index /= loops[i].size) {
        const BatchLoop& loop = loops[i];
        const int64_t at = index % loop.size;
        advance(one.query.view, at * loop.query);
        advance(one.key.view, at * loop.key);
        advance(one.value.view, at * loop.value);
        if (one.mask) advance(one.mask->view, at * loop.mask);
        if (one.out) advance(one.out->view, at * loop.out);
        if (one.lse) advance(one.lse->view, at * loop.lse);
        if (one.dropout) one.dropout->batch_first += at * loop.index;
    }
    // What is left of each: its views end where the slice does.
    const auto narrow = [&](Operand& operand, int64_t nheads, int64_t seqlen, int64_t channels) {
        TensorView& view = operand.view;
        const int row = 4 - row_of(layout), head = 4 - head_of(layout);
        view.ndim = 4;
        const auto set = [&](int i, int64_t size, int64_t stride) {
            view.shape[i] = stride == 0 && size > 0 ? 1 : size;
            view.strides[i] = stride;
        };
        set(0, batch, operand.stride_batch);
        set(head, nheads, operand.stride_head);
        set(row, seqlen, operand.stride_row);
        set(3, channels, operand.stride_channel);
    };
    narrow(one.query, nheads_q, seqlen_q, head_dim);
    narrow(one.key, nheads_kv, seqlen_kv, head_dim);
    narrow(one.value, nheads_kv, seqlen_kv, head_dim_v);
    if (one.out) narrow(*one.out, nheads_q, seqlen_q, head_dim_v);
    if (one.lse) {
        TensorView& view = one.lse->view;
        view.ndim = 3;
        const int64_t sizes[] = {batch, nheads_q, seqlen_q};
        const int64_t strides[] = {one.lse->stride_batch, one.lse->stride_head,
                                   one.lse->stride_row};
        std::copy_n(sizes, 3, view.shape);
        std::copy_n(strides, 3, view.strides);
    }
    if (one.mask) {
        TensorView& given = one.mask->given;
        given = one.mask->view;
        for (int i = 0; i < 4; ++i)
            if (given.strides[i] == 0 && given.shape[i] > 0) given.shape[i] = 1;
    }
    return one;
}

}  // namespace umfa
