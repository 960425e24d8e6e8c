#include "core/weights.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "core/checks.h"
#include "core/parts.h"

namespace umfa {
namespace {

constexpr int64_t most_columns = max_head_dim_v;  // as many channels as a value can have

void set_shape(TensorView& view, std::initializer_list<int64_t> shape,
               std::initializer_list<int64_t> strides) {
    view.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    std::copy(strides.begin(), strides.end(), view.strides);
}

/// Numbers of float32 on the device of a tensor, which the host reads and writes too.
class Floats {
public:
    Floats(const Backend& backend, const TensorView& like, int64_t count,
           std::string_view function) {
        memory_.device = like.device;
        memory_.device_id = like.device_id;
        const auto size = static_cast<size_t>(std::max<int64_t>(count, 1));
        if (like.device == Device::cpu) {
            own_.reset(new float[size]);
            memory_.data = host_ = own_.get();
            return;
        }
        memory_.data = backend.allocate(size * sizeof(float), function);
        host_ = static_cast<float*>(backend.contents(memory_.data));
        deallocate_ = backend.deallocate;
    }
    ~Floats() {
        if (deallocate_) deallocate_(memory_.data);
    }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;

    float* host() { return host_; }
    /// A tensor that starts at number `first`.
    TensorView view(int64_t first, std::initializer_list<int64_t> shape,
                    std::initializer_list<int64_t> strides) const {
        TensorView view = memory_;
        set_shape(view, shape, strides);
        advance(view, first);
        return view;
    }
    /// (rows, heads, channels), one after the other.
    TensorView compact(int64_t rows, int64_t heads, int64_t channels) const {
        return view(0, {rows, heads, channels}, {heads * channels, channels, 1});
    }

private:
    TensorView memory_;
    std::unique_ptr<float[]> own_;
    float* host_ = nullptr;
    void (*deallocate_)(void*) = nullptr;
};

/// Copies between dtypes and strides on any device, as the merge of one part.
class Copier {
public:
    /// `rows`: the most that it will copy, over all heads.
    Copier(const Backend& backend, const Problem& problem, int64_t rows)
        : backend_(backend),
          function_(problem.function),
          zero_(backend, problem.query.view, 1, function_),
          lse_(backend, problem.query.view, rows, function_) {
        zero_.host()[0] = 0;
    }

    /// Both are (rows, heads, channels).
    void copy(const TensorView& from, const TensorView& to) {
        const int64_t rows = to.shape[0], heads = to.shape[1];
        for (int64_t first = 0; first < to.shape[2]; first += most_columns) {
            const int64_t channels = std::min(most_columns, to.shape[2] - first);
            TensorView out = to;
            out.shape[2] = channels;
            advance(out, first * to.strides[2]);
            CombineRequest request{
                function_, from, zero_.view(0, {1, rows, heads}, {0, 0, 0}), {}, out};
            set_shape(request.out_partial, {1, rows, heads, channels},
                      {0, from.strides[0], from.strides[1], from.strides[2]});
            advance(request.out_partial, first * from.strides[2]);
            const CombineProblem problem = CombineProblem::make(request);
            combine(backend_, problem,
                    problem.results(out, lse_.view(0, {rows, heads}, {heads, 1})));
        }
    }

    void clear(const TensorView& to) {
        copy(zero_.view(0, {to.shape[0], to.shape[1], to.shape[2]}, {0, 0, 0}), to);
    }

private:
    const Backend& backend_;
    const std::string_view function_;
    Floats zero_, lse_;
};

/// Rows of one sequence, as (1, rows, heads, channels).
TensorView rows_of(const Operand& operand, int64_t batch, int64_t row, int64_t rows, int64_t heads,
                   int64_t channels) {
    TensorView view = operand.view;
    advance(view, batch * operand.stride_batch + row * operand.stride_row);
    set_shape(view, {1, rows, heads, channels},
              {0, operand.stride_row, operand.stride_head, operand.stride_channel});
    return view;
}

/// The problem of sequence b alone, whose `rows` these are. The tensors are (1, rows, heads,
/// channels). Value and out are float32, so the arithmetic is too, and small weights do not round to
/// 0 and lose their sign.
Problem one_sequence(const Problem& problem, int64_t b, SequenceRows rows,
                     const TensorView& value) {
    const TensorView query = rows_of(problem.query, rows.query_batch, rows.query_row, rows.seqlen_q,
                                     problem.nheads_q, problem.head_dim);
    const TensorView key = rows_of(problem.key, rows.kv_batch, rows.kv_row, rows.seqlen_kv,
                                   problem.nheads_kv, problem.head_dim);
    Problem one = problem;
    one.visible = problem.visible_of(rows);
    rows.query_batch = rows.query_row = rows.kv_batch = rows.kv_row = 0;
    if (one.sequences.given) one.sequences.rows = {rows};
    one.layout = Layout::bshd;
    one.ndim = 4;
    one.batch = one.batch_shape[0] = 1;
    one.loops.clear();
    one.seqlen_q = one.query_rows = rows.seqlen_q;
    one.seqlen_kv = rows.seqlen_kv;
    one.head_dim_v = value.shape[3];
    one.query = operand_of(query, Layout::bshd);
    one.key = operand_of(key, Layout::bshd);
    one.value = operand_of(value, Layout::bshd);
    one.out_dtype = DType::f32;
    one.wants_lse = false;
    if (one.alibi) {
        advance(one.alibi->view, b * one.alibi->stride_batch);
        if (one.alibi->view.ndim == 2) one.alibi->view.shape[0] = 1;
        one.alibi->stride_batch = 0;
    }
    if (one.mask) {
        TensorView& view = one.mask->view;
        advance(view, b * view.strides[0]);
        view.shape[0] = 1;
        view.strides[0] = 0;
        one.mask->given = view;
        for (int i = 0; i < 4; ++i)
            if (view.strides[i] == 0 && view.shape[i] > 0) one.mask->given.shape[i] = 1;
    }
    if (one.dropout) one.dropout->batch_first += b * one.dropout->batch_step;
    return one;
}

Problem without_dropout(Problem problem) {
    problem.dropout.reset();
    return problem;
}

/// The weights of one call, sequence by sequence.
class Weights {
public:
    Weights(const Backend& backend, const Problem& problem, const TensorView& matrix)
        : backend_(backend),
          problem_(problem),
          matrix_(matrix),
          copier_(backend, problem, problem.seqlen_q * problem.nheads_q),
          seen_(floats(problem.seqlen_q * problem.nheads_q * columns())),
          kept_(floats(problem.dropout ? problem.seqlen_q * problem.nheads_q * columns() : 0)),
          identity_(floats(2 * problem.seqlen_kv)) {}

    void run() {
        for (int64_t b = 0; b < problem_.batch; ++b) {
            const SequenceRows rows = problem_.sequence(b);
            if (problem_.sequences.given)
                copier_.clear(place(b, problem_.seqlen_q, 0, problem_.seqlen_kv));
            if (rows.seqlen_q > 0 && rows.seqlen_kv > 0) run(b, rows);
        }
    }

private:
    int64_t columns() const { return std::min(most_columns, problem_.seqlen_kv); }
    Floats floats(int64_t count) const {
        return {backend_, problem_.query.view, count, problem_.function};
    }

    /// Where the matrix has columns [first, first + width) of sequence b: (rows, heads, columns).
    TensorView place(int64_t b, int64_t rows, int64_t first, int64_t width) const {
        TensorView view = matrix_;
        const int64_t* strides = matrix_.strides;
        advance(view, b * strides[0] + first * strides[3]);
        set_shape(view, {rows, problem_.nheads_q, width}, {strides[2], strides[1], strides[3]});
        return view;
    }

    static TensorView with_batch(const TensorView& rows) {
        TensorView view = rows;
        set_shape(view, {1, rows.shape[0], rows.shape[1], rows.shape[2]},
                  {0, rows.strides[0], rows.strides[1], rows.strides[2]});
        return view;
    }

    void run(int64_t b, const SequenceRows& rows) {
        const int64_t heads = problem_.nheads_q, keys = rows.seqlen_kv;
        // Zeros around a single 1: a row starts one number before the row above it, so this is an
        // identity of any size.
        std::fill_n(identity_.host(), 2 * keys, 0.f);
        identity_.host()[keys - 1] = 1;
        for (int64_t first = 0; first < keys; first += most_columns) {
            const int64_t width = std::min(most_columns, keys - first);
            const TensorView value = identity_.view(
                keys - 1 + first, {1, keys, problem_.nheads_kv, width}, {0, -1, 0, 1});
            const TensorView found = seen_.compact(rows.seqlen_q, heads, width);
            const auto compute = [&](const Problem& one, const TensorView& out) {
                forward(backend_, one, {operand_of(with_batch(out), Layout::bshd), {}});
            };
            const Problem kept = one_sequence(problem_, b, rows, value);
            if (kept.dropout) compute(kept, kept_.compact(rows.seqlen_q, heads, width));
            compute(without_dropout(kept), found);
            if (problem_.dropout) mark_dropped(rows.seqlen_q * heads * width);
            copier_.copy(found, place(b, rows.seqlen_q, first, width));
        }
    }

    /// Makes weights negative that dropout has made 0.
    void mark_dropped(int64_t count) {
        float* seen = seen_.host();
        const float* kept = kept_.host();
        for (int64_t i = 0; i < count; ++i)
            if (kept[i] == 0 && seen[i] > 0) seen[i] = -seen[i];
    }

    const Backend& backend_;
    const Problem& problem_;
    const TensorView& matrix_;
    Copier copier_;
    Floats seen_, kept_, identity_;
};

/// The tensors that are read while the matrix is written.
void check_apart(const Checker& check, const Problem& problem, const TensorView& matrix) {
    const Function& names = *problem.names;
    const auto apart = [&](const TensorView& view, Field field) {
        check_overlap(check, matrix, "weights", view, names[field]);
    };
    apart(problem.query.view, Field::query);
    apart(problem.key.view, Field::key);
    if (problem.alibi) apart(problem.alibi->view, Field::alibi_slopes);
    if (problem.mask) apart(problem.mask->given, Field::attn_mask);
    if (problem.sinks) apart(problem.sinks->logits, Field::learnable_sink);
    if (!problem.rotary) return;
    apart(problem.rotary->cos, Field::rotary_cos);
    apart(problem.rotary->sin, Field::rotary_sin);
}

void check_matrix(const Checker& check, const TensorView& matrix, const TensorView& shape) {
    if (matrix.ndim != shape.ndim || !std::equal(matrix.shape, matrix.shape + 4, shape.shape))
        check.value("weights has the wrong shape", shape_text(matrix), shape_text(shape));
    if (matrix.dtype != shape.dtype)
        check.type("weights has the wrong dtype", name_of(matrix.dtype), name_of(shape.dtype));
    check_same_device(check, matrix, "weights", shape);
    check_memory(check, matrix, "weights");
    check_distinct(check, matrix, "weights");
}

[[noreturn]] void refuse(const Function& function, const std::string& what) {
    fail(ErrorKind::unsupported, function.name,
         "the weights of a call with " + what + " cannot be returned", "a call for its weights",
         "out and lse of such a call, or a call without it");
}

}  // namespace

void check_weights(const Problem& problem) {
    const Function& names = *problem.names;
    if (problem.qv) refuse(names, names[Field::qv]);
    if (problem.page_size > 0) refuse(names, names[Field::block_table]);
    if (problem.quant_mode != QuantMode::none) refuse(names, names[Field::quant_mode]);
    if (problem.append) refuse(names, names[Field::new_key]);
    if (names.broadcasts) refuse(names, "batch dimensions that broadcast");
}

Problem make_weights_problem(AttentionRequest request) {
    const Function& names = *request.function;
    if (request.out_dtype)
        fail(ErrorKind::type, names.name, names[Field::out_dtype] + " is for out",
             name_of(*request.out_dtype), "none: the weights have query's dtype");
    // Before anything is said about the key in the place of a value.
    if (request.new_key || request.new_value) refuse(names, names[Field::new_key]);
    if (request.qv) refuse(names, names[Field::qv]);
    if (!request.value && request.key) {
        request.value = request.key;
        const int last = request.value->ndim - 1;
        if (last >= 0)
            request.value->shape[last] =
                std::min<int64_t>(request.value->shape[last], max_head_dim_v);
    }
    Problem problem = Problem::make(request);
    check_weights(problem);
    return problem;
}

TensorView weights_shape(const Problem& problem) {
    TensorView shape = problem.query.view;
    set_shape(shape, {problem.batch, problem.nheads_q, problem.seqlen_q, problem.seqlen_kv},
              {0, 0, 0, 0});
    return shape;
}

Steps weights_steps(const Problem& problem, bool runs_call) {
    Steps steps{problem, "its weights", runs_call, {}, {}};
    if (weights_shape(problem).size() == 0) return steps;
    TensorView without_memory = problem.query.view;
    without_memory.dtype = DType::f32;
    without_memory.data = nullptr;
    without_memory.byte_offset = 0;
    // Sequences of the same lengths take the same kernels.
    std::set<std::pair<int64_t, int64_t>> lengths;
    for (int64_t b = 0; b < problem.batch; ++b) {
        const SequenceRows rows = problem.sequence(b);
        const int64_t keys = rows.seqlen_kv;
        if (rows.seqlen_q == 0 || keys == 0 || !lengths.emplace(rows.seqlen_q, keys).second)
            continue;
        // Columns come in blocks. The last block may be narrower.
        for (const int64_t width : {std::min(most_columns, keys), (keys - 1) % most_columns + 1}) {
            TensorView value = without_memory;
            set_shape(value, {1, keys, problem.nheads_kv, width}, {0, -1, 0, 1});
            const Problem one = one_sequence(problem, b, rows, value);
            if (one.dropout) steps.forwards.push_back(one);
            steps.forwards.push_back(without_dropout(one));
        }
    }
    CombineProblem copy;
    copy.function = problem.function;
    copy.parts = copy.batch = 1;
    copy.packed = true;
    copy.out_dtype = problem.query.view.dtype;
    copy.seqlen_q = problem.seqlen_q;
    copy.nheads = problem.nheads_q;
    copy.head_dim = std::min(most_columns, problem.seqlen_kv);
    copy.out_partial.view = copy.lse_partial.view = without_memory;
    set_shape(copy.out_partial.view, {1, copy.seqlen_q, copy.nheads, copy.head_dim}, {0, 0, 0, 0});
    set_shape(copy.lse_partial.view, {1, copy.seqlen_q, copy.nheads}, {0, 0, 0});
    steps.combines.push_back(copy);
    return steps;
}

void weights(const Backend& backend, const Problem& problem, const TensorView& matrix) {
    const Checker check{problem.function};
    check_weights(problem);
    check_matrix(check, matrix, weights_shape(problem));
    check_apart(check, problem, matrix);
    if (matrix.size() > 0) Weights(backend, problem, matrix).run();
}

}  // namespace umfa
