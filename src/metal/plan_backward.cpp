#include "metal/plan_backward.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/error.h"
#include "metal/launch_builder.h"
#include "metal/plan_sequences.h"
#include "shared/backward_shapes.h"
#include "shared/indices.h"
#include "shared/threadgroup_memory.h"

namespace umfa::metal {
namespace {

constexpr Slot layout[] = {
    {UMFA_BACKWARD_QUERY, "query"},
    {UMFA_BACKWARD_KEY, "key"},
    {UMFA_BACKWARD_VALUE, "value"},
    {UMFA_BACKWARD_DOUT, "dout"},
    {UMFA_BACKWARD_MASK, "attn_mask"},
    {UMFA_BACKWARD_SLOPES, "alibi_slopes"},
    {UMFA_BACKWARD_ROTARY_COS, "rotary_cos"},
    {UMFA_BACKWARD_ROTARY_SIN, "rotary_sin"},
    {UMFA_BACKWARD_QV, "qv"},
};
constexpr Slot mask_layout[] = {
    {UMFA_DMASK_QUERY, "query"},
    {UMFA_DMASK_KEY, "key"},
    {UMFA_DMASK_VALUE, "value"},
    {UMFA_DMASK_DOUT, "dout"},
    {UMFA_DMASK_MASK, "attn_mask"},
    {UMFA_DMASK_SLOPES, "alibi_slopes"},
    {UMFA_DMASK_ROTARY_COS, "rotary_cos"},
    {UMFA_DMASK_ROTARY_SIN, "rotary_sin"},
    {UMFA_DMASK_QV, "qv"},
};
constexpr Slot delta_layout[] = {
    {UMFA_DELTA_OUT, "out"},
    {UMFA_DELTA_LSE, "lse"},
    {UMFA_DELTA_DOUT, "dout"},
    {UMFA_DELTA_DLSE, "dlse"},
};

struct Shape {
    int d, dv, tile, rows, simdgroups, split;
    bool one_tile;
    int first_family, last_family;
};
#define UMFA_ROW(...) {__VA_ARGS__},
constexpr Shape dq_shapes_16[] = {UMFA_DQ_SHAPES_16(UMFA_ROW)};
constexpr Shape dq_shapes_32[] = {UMFA_DQ_SHAPES_32(UMFA_ROW)};
constexpr Shape dq_shapes_widened[] = {UMFA_DQ_SHAPES_WIDENED(UMFA_ROW)};
constexpr Shape dkv_shapes_16[] = {UMFA_DKV_SHAPES_16(UMFA_ROW)};
constexpr Shape dkv_shapes_32[] = {UMFA_DKV_SHAPES_32(UMFA_ROW)};
constexpr Shape dkv_shapes_widened[] = {UMFA_DKV_SHAPES_WIDENED(UMFA_ROW)};
#undef UMFA_ROW

/// Simdgroups of a threadgroup of umfa_delta, which are independent of each other.
constexpr int delta_simdgroups = 8;
/// Of umfa_row_sums, which add up together.
constexpr int row_sums_simdgroups = 8;

Shape shape_for(std::span<const Shape> shapes, const Problem& problem, const Capabilities& gpu) {
    const int family = static_cast<int>(gpu.family);
    for (const Shape& shape : shapes)
        if (shape.d >= problem.head_dim && shape.dv >= problem.head_dim_v &&
            shape.first_family <= family && family <= shape.last_family)
            return shape;
    fail(ErrorKind::internal, problem.function, "no tile shape",
         std::to_string(std::max(problem.head_dim, problem.head_dim_v)),
         "one in backward_shapes.h for every head_dim");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// One call's plan, launch after launch.
class BackwardPlanner {
public:
    BackwardPlanner(const BackwardProblem& problem, const BackwardResults& results,
                    const Capabilities& gpu)
        : problem_(problem),
          forward_(problem.forward),
          results_(results),
          gpu_(gpu),
          one_dtype_(forward_.one_dtype() && problem.dout.view.dtype == forward_.out_dtype),
          type_(element_type(one_dtype_ ? forward_.query.view.dtype : DType::f32, gpu)) {
        set_tensors();
        set_constants();
        set_params();
    }

    LaunchPlan plan() {
        if (forward_.sequences.given) clear_unused();
        const int64_t heads_kv = forward_.nheads_kv;
        add_delta();
        if (forward_.sequences.given && forward_.batch > 0)
            sequences_ = add_data(plan_, sequence_params(forward_));
        if (results_.sinks) add_sink_sums();
        if (results_.alibi_slopes) slope_terms_ = add_scratch(4 * statistics_rows());
        if (heads_kv > 0 && query_batches() > 0 && forward_.batch > 0) add_products();
        if (results_.alibi_slopes) add_slope_sums();
        if (results_.mask) add_mask();
        return std::move(plan_);
    }

private:
    /// The list for the type of the tiles and that of their fragments.
    std::span<const Shape> shapes_of(std::span<const Shape> of_16, std::span<const Shape> of_32,
                                     std::span<const Shape> widened) const {
        return type_.operand_bytes == 2 ? of_16 : type_.staged_bytes == 2 ? widened : of_32;
    }

    void set_tensors() {
        plan_.tensors = input_tensors(forward_);
        if (!results_.sinks)
            std::erase_if(plan_.tensors, [](const PlanTensor& tensor) {
                return std::string_view(tensor.name) == "learnable_sink";  // lse has it
            });
        const auto add = [&](const char* name, const TensorView& view, bool written) {
            plan_.tensors.push_back({name, view, !written, written});
        };
        add("out", problem_.out.view, false);
        add("lse", problem_.lse.view, false);
        add("dout", problem_.dout.view, false);
        if (problem_.dlse) add("dlse", problem_.dlse->view, false);
        if (results_.query) add("dq", results_.query->view, true);
        if (results_.key) add("dk", results_.key->view, true);
        if (results_.value) add("dv", results_.value->view, true);
        if (results_.qv) add("dqv", results_.qv->view, true);
        if (results_.sinks) add("dsinks", results_.sinks->logits, true);
        if (results_.mask) add("dmask", results_.mask->given, true);
        if (results_.alibi_slopes) add("dalibi_slopes", results_.alibi_slopes->view, true);
    }

    /// Value of a kind constant for a gradient. Kernels of a narrower type write float32 too.
    int gradient_kind(const std::optional<Operand>& gradient) const {
        if (!gradient) return UMFA_MASK_NONE;
        const DType dtype = gradient->view.dtype;
        if (!one_dtype_) return narrow_kind(dtype);
        return dtype == forward_.query.view.dtype ? UMFA_MASK_NONE : UMFA_MASK_F32;
    }

    void set_constants() {
        constants_ = constants_of(forward_, {problem_.out, problem_.lse});
        const auto set = [&](constant::Index index, int value) { constants_[index].value = value; };
        bool wide = wide_loads(forward_) && rows_are_wide(forward_.query, forward_.head_dim) &&
                    rows_are_wide(problem_.out, forward_.head_dim_v) &&
                    rows_are_wide(problem_.dout, forward_.head_dim_v) &&
                    (!forward_.qv || rows_are_wide(*forward_.qv, forward_.head_dim_v));
        bool unit = constants_[constant::unit_channels].value != 0;
        unit = unit && problem_.dout.stride_channel == 1;
        for (const auto* gradient : {&results_.query, &results_.key, &results_.value, &results_.qv})
            if (*gradient) unit = unit && (*gradient)->stride_channel == 1;
        sink_kind_ = constants_[constant::sink_kind].value;
        set(constant::has_sinks, false);  // they are in the log-sum-exp
        set(constant::sink_kind, UMFA_MASK_NONE);
        set(constant::wide_loads, wide);
        // Queries are rotated as keys are.
        set(constant::wide_rotary, wide && constants_[constant::wide_rotary].value != 0 &&
                                       forward_.query.view.dtype == forward_.key.view.dtype);
        set(constant::near_rows,
            false);  // asks about keys and values alone; queries are staged too
        set(constant::unit_channels, unit);
        set(constant::has_dlse, problem_.dlse.has_value());
        set(constant::wants_dq, results_.query.has_value());
        set(constant::wants_dslopes, results_.alibi_slopes.has_value());
        set(constant::wants_dk, results_.key.has_value());
        set(constant::wants_dv, results_.value.has_value());
        set(constant::dq_kind, gradient_kind(results_.query));
        set(constant::wants_dqv, results_.qv.has_value());
        set(constant::dqv_kind, gradient_kind(results_.qv));
        set(constant::dk_kind, gradient_kind(results_.key));
        set(constant::dv_kind, gradient_kind(results_.value));
        if (one_dtype_) return;
        set(constant::query_kind, narrow_kind(forward_.query.view.dtype));
        set(constant::key_kind, narrow_kind(forward_.key.view.dtype));
        set(constant::value_kind, narrow_kind(forward_.value.view.dtype));
        set(constant::out_kind, narrow_kind(forward_.out_dtype));
        set(constant::dout_kind, narrow_kind(problem_.dout.view.dtype));
    }

    void set_params() {
        if (forward_.nheads_kv == 0) return;
        params_.forward = forward_params(forward_, {problem_.out, problem_.lse});
        params_.dout = strides_of(problem_.dout);
        if (problem_.dlse) params_.dlse = strides_of(*problem_.dlse);
        if (results_.query) params_.dq = strides_of(*results_.query);
        if (results_.qv) params_.dqv = strides_of(*results_.qv);
        if (results_.key) params_.dk = strides_of(*results_.key);
        if (results_.value) params_.dv = strides_of(*results_.value);
        const int raised = std::string_view(type_.operand) == "half" ? UMFA_HALF_RAISED : 0;
        lowered_ = std::ldexp(1.0, -raised);
        params_.score_factor = static_cast<float>(forward_.softmax_scale * lowered_);
        params_.value_factor =
            static_cast<float>(static_cast<double>(params_.forward.dropout.factor) * lowered_);
        params_.qv_factor = static_cast<float>(forward_.softmax_scale /
                                               static_cast<double>(params_.forward.dropout.factor));
        params_.raised = static_cast<float>(raised);
        params_.rows = static_cast<int32_t>(forward_.query_rows);
        params_.statistics = {forward_.nheads_q * forward_.query_rows, forward_.query_rows, 1, 0};
    }

    /// Indices of the batch in the tensors of queries.
    int64_t query_batches() const {
        if (!forward_.sequences.given) return forward_.batch;
        return forward_.ndim == 4 ? forward_.batch_shape[0] : 1;
    }

    /// Zeros in rows of the gradients that belong to no sequence.
    void clear_unused() {
        const auto clear = [&](const char* name, const std::optional<Operand>& gradient,
                               const std::vector<RowRange>& rows, int64_t heads, int64_t channels) {
            if (gradient)
                plan_cleared_rows(plan_, forward_, {*gradient, {}}, name, rows, heads, channels);
        };
        clear("dq", results_.query, forward_.unused_rows(), forward_.nheads_q, forward_.head_dim);
        clear("dqv", results_.qv, forward_.unused_rows(), forward_.nheads_q, forward_.head_dim_v);
        const std::vector<RowRange> keys = unused_key_rows(forward_);
        clear("dk", results_.key, keys, forward_.nheads_kv, forward_.head_dim);
        clear("dv", results_.value, keys, forward_.nheads_kv, forward_.head_dim_v);
    }

    /// The constants with those that a kernel does not read off, so that it has fewer variants.
    std::vector<Constant> without(std::initializer_list<constant::Index> unread) const {
        std::vector<Constant> found = constants_;
        for (const constant::Index index : unread) found[index].value = 0;
        return found;
    }
    /// And with all but those off.
    std::vector<Constant> only(std::initializer_list<constant::Index> read) const {
        std::vector<Constant> found = constants_;
        for (Constant& own : found)
            if (std::find(read.begin(), read.end(), own.index) == read.end()) own.value = 0;
        return found;
    }

    /// Rows that have statistics.
    int64_t statistics_rows() const {
        return query_batches() * forward_.nheads_q * forward_.query_rows;
    }

    /// Returns the number of the piece.
    uint32_t add_scratch(int64_t bytes) {
        // Metal has no empty buffers; what needs no bytes is not read.
        plan_.scratch_bytes.push_back(static_cast<uint64_t>(std::max<int64_t>(bytes, 4)));
        return static_cast<uint32_t>(plan_.scratch_bytes.size() - 1);
    }

    void add_delta() {
        const int64_t rows = forward_.query_rows, heads = forward_.nheads_q;
        statistics_ = add_scratch(8 * statistics_rows());
        if (rows * heads * query_batches() == 0) return;
        // As the other kernels read the tensors, but without fragments.
        const ElementType stored = stored_type(one_dtype_ ? forward_.out_dtype : DType::f32);
        const int simdgroups = fit_simdgroups(delta_simdgroups, 1, gpu_).count;
        LaunchBuilder(plan_, forward_.function,
                      only({constant::out_kind, constant::dout_kind, constant::unit_channels,
                            constant::wide_loads, constant::has_dlse}),
                      std::string("delta_") + stored.name, "backward.metal", UMFA_DELTA_BUFFERS)
            .stores(stored)
            .tensors(delta_layout)
            .scratch(UMFA_DELTA_STATISTICS, statistics_)
            .params(UMFA_DELTA_PARAMS, params_)
            .grid(ceil_div(rows, simdgroups), heads, query_batches())
            .simdgroups(simdgroups)
            .add();
    }

    /// Sums over rows: one over the whole batch, or one for each sequence, and one over all heads or
    /// one for each. `factor` is on each sum. The caller binds the rows.
    LaunchBuilder row_sums(RowSumsParams params, DType dtype, double factor, bool by_sequence,
                           bool by_head = true) {
        params.factor = static_cast<float>(factor);
        params.batch = static_cast<int32_t>(by_sequence ? 1 : forward_.batch);
        params.heads = static_cast<int32_t>(by_head ? 1 : forward_.nheads_q);
        params.seqlen_q = static_cast<int32_t>(forward_.seqlen_q);
        const ElementType stored = stored_type(dtype);
        LaunchBuilder builder(plan_, forward_.function, only({}),
                              std::string("row_sums_") + stored.name, "row_sums.metal",
                              UMFA_ROW_SUMS_BUFFERS);
        builder.stores(stored)
            .constant(constant::has_sequences, sequences_.has_value())
            .params(UMFA_ROW_SUMS_PARAMS, params)
            .grid(by_head ? forward_.nheads_q : 1, by_sequence ? forward_.batch : 1)
            .simdgroups(fit_simdgroups(row_sums_simdgroups, 1, gpu_).count)
            .data(UMFA_ROW_SUMS_SEQUENCES, sequences_);
        return builder;
    }

    void add_sink_sums() {
        if (forward_.nheads_q == 0) return;
        const OperandStrides& pairs = params_.statistics;
        RowSumsParams params{};
        params.rows = {2 * pairs.batch, 2 * pairs.head, 2 * pairs.row, 0};
        params.sum_head = results_.sinks->logits.strides[0];
        params.sink = forward_.sinks->logits.strides[0];
        row_sums(params, results_.sinks->logits.dtype, -lowered_, false)
            .constant(constant::has_sinks, true)
            .constant(constant::sink_kind, sink_kind_)
            .scratch(UMFA_ROW_SUMS_ROWS, statistics_)
            .tensor({UMFA_ROW_SUMS_SINKS, "learnable_sink"})
            .tensor({UMFA_ROW_SUMS_SUMS, "dsinks"})
            .add();
    }

    void add_slope_sums() {
        const Alibi& sums = *results_.alibi_slopes;
        const bool by_sequence = sums.view.ndim == 2;
        if (forward_.nheads_q == 0 || (by_sequence && forward_.batch == 0)) return;
        RowSumsParams params{};
        params.rows = params_.statistics;
        params.sum_batch = sums.stride_batch;
        params.sum_head = sums.stride_head;
        row_sums(params, sums.view.dtype, -lowered_, by_sequence)
            .scratch(UMFA_ROW_SUMS_ROWS, slope_terms_)
            .tensor({UMFA_ROW_SUMS_SUMS, "dalibi_slopes"})
            .add();
    }

    // ---- the mask --------------------------------------------------------------------------------

    /// Where a sum over rows and columns would be the work of one threadgroup, each row has one first.
    void add_mask() {
        const DenseMask& mask = *results_.mask;
        const int64_t* strides = mask.view.strides;
        MaskGradientParams params{};
        params.batch = strides[0];
        params.head = strides[1];
        params.row = strides[2];
        params.column = strides[3];
        params.factor = static_cast<float>(lowered_);
        params.rows = static_cast<int32_t>(size_at(mask.given, 2));
        params.columns = static_cast<int32_t>(size_at(mask.given, 1));
        params.all_rows = strides[2] == 0;
        params.all_columns = strides[3] == 0;
        const int64_t batches = strides[0] == 0 ? 1 : forward_.batch;
        const int64_t heads = strides[1] == 0 ? 1 : forward_.nheads_q;
        if (params.rows == 0 || params.columns == 0 || batches == 0 || heads == 0) return;
        if (params.all_rows && params.all_columns) {
            add_mask_sums(strides);
            return;
        }
        const int kind =
            mask.given.dtype == DType::f32 ? UMFA_MASK_F32 : constants_[constant::mask_kind].value;
        add_mask_tiles(params, kind, batches, heads, [&](LaunchBuilder& builder) {
            builder.tensor({UMFA_DMASK_DMASK, "dmask"});
        });
    }

    void add_mask_sums(const int64_t* strides) {
        const int64_t heads = forward_.nheads_q, rows = forward_.seqlen_q;
        const uint32_t terms = add_scratch(4 * forward_.batch * heads * rows);
        MaskGradientParams params{};
        params.batch = heads * rows;
        params.head = rows;
        params.row = 1;
        params.factor = static_cast<float>(lowered_);
        params.rows = static_cast<int32_t>(rows);
        params.columns = params.all_columns = 1;
        if (forward_.batch * heads * rows > 0)
            add_mask_tiles(
                params, UMFA_MASK_F32, forward_.batch, heads,
                [&](LaunchBuilder& builder) { builder.scratch(UMFA_DMASK_DMASK, terms); });
        RowSumsParams sums{};
        sums.rows = {heads * rows, rows, 1, 0};
        sums.sum_batch = strides[0];
        sums.sum_head = strides[1];
        // All rows of the longest sequence have a term, if only 0.
        row_sums(sums, results_.mask->given.dtype, 1, strides[0] != 0, strides[1] != 0)
            .constant(constant::has_sequences, false)
            .scratch(UMFA_ROW_SUMS_ROWS, terms)
            .tensor({UMFA_ROW_SUMS_SUMS, "dmask"})
            .add();
    }

    /// The gradient of so many `batches` and `heads` of the mask. `bind`: what is written.
    template <class Bind>
    void add_mask_tiles(MaskGradientParams params, int kind, int64_t batches, int64_t heads,
                        const Bind& bind) {
        Shape shape =
            shape_for(shapes_of(dq_shapes_16, dq_shapes_32, dq_shapes_widened), forward_, gpu_);
        const Simdgroups simdgroups = fit_simdgroups(shape.simdgroups, shape.split, gpu_);
        shape.simdgroups = simdgroups.count;
        const int block = 8 * shape.rows * shape.simdgroups / shape.split;
        params.backward = params_;
        params.batches = static_cast<int32_t>(forward_.batch / batches);
        params.heads = static_cast<int32_t>(forward_.nheads_q / heads);
        params.tiles = static_cast<int32_t>(ceil_div(params.columns, shape.tile));
        LaunchBuilder builder(
            plan_, forward_.function,
            without({constant::has_lse, constant::out_kind, constant::has_dlse, constant::dq_kind,
                     constant::dk_kind, constant::dv_kind, constant::wants_dq, constant::wants_dk,
                     constant::wants_dv, constant::wants_dslopes, constant::wants_dqv,
                     constant::dqv_kind}),
            "dmask_" + std::string(type_.name) + "_d" + std::to_string(shape.d) + "_v" +
                std::to_string(shape.dv) + "_k" + std::to_string(shape.tile) + simdgroups.suffix,
            "backward_mask.metal", UMFA_DMASK_BUFFERS);
        builder.computes(type_)
            .shape(shape.d, shape.dv, shape.tile, shape.rows, shape.simdgroups, shape.split,
                   shape.one_tile)
            .constant(constant::dmask_kind, kind)
            .constant(constant::has_sequences, sequences_.has_value())
            .tensors(mask_layout)
            .scratch(UMFA_DMASK_STATISTICS, statistics_)
            .data(UMFA_DMASK_SEQUENCES, sequences_)
            .params(UMFA_DMASK_PARAMS, params)
            .grid(ceil_div(params.rows, block) * params.tiles, heads, batches)
            .simdgroups(shape.simdgroups)
            .threadgroup_bytes(dmask_bytes(shape.d, shape.dv, shape.tile, shape.rows,
                                           shape.simdgroups, shape.split, shape.one_tile,
                                           type_.staged_bytes));
        bind(builder);
        const double shared =
            static_cast<double>(params.batches) * params.heads *
            static_cast<double>(params.all_rows ? forward_.seqlen_q : block) *
            static_cast<double>(params.all_columns ? forward_.seqlen_kv : shape.tile);
        const double seconds = core_seconds({2.0 * shared * (shape.d + shape.dv), 0}, gpu_);
        builder.add(slices_of(builder.grid(), seconds, gpu_, [&](uint32_t) { return seconds; }));
    }

    /// What needs S and dP.
    void add_products() {
        if (results_.query || results_.qv || results_.alibi_slopes)
            add_tiles("dq", shapes_of(dq_shapes_16, dq_shapes_32, dq_shapes_widened),
                      forward_.nheads_q, true);
        if (results_.key || results_.value)
            add_tiles("dkv", shapes_of(dkv_shapes_16, dkv_shapes_32, dkv_shapes_widened),
                      forward_.nheads_kv, false);
    }

    /// One threadgroup for each block of rows of each sequence.
    std::vector<SequenceTask> tasks_of(bool of_queries, int block) const {
        std::vector<SequenceTask> tasks;
        for (int64_t b = 0; b < forward_.batch; ++b) {
            const SequenceRows rows = forward_.sequence(b);
            for (int64_t row = 0; row < (of_queries ? rows.seqlen_q : rows.seqlen_kv); row += block)
                tasks.push_back({static_cast<int32_t>(b), static_cast<int32_t>(row), 0, 0});
        }
        return tasks;
    }

    /// umfa_dq, whose blocks are queries, or umfa_dkv, whose blocks are keys.
    void add_tiles(const std::string& stem, std::span<const Shape> shapes, int64_t heads,
                   bool of_queries) {
        Shape shape = shape_for(shapes, forward_, gpu_);
        const Simdgroups simdgroups = fit_simdgroups(shape.simdgroups, shape.split, gpu_);
        shape.simdgroups = simdgroups.count;
        const int block = 8 * shape.rows * shape.simdgroups / shape.split;
        const int64_t rows = of_queries ? forward_.seqlen_q : forward_.seqlen_kv;
        std::vector<SequenceTask> tasks;
        if (forward_.sequences.given) tasks = tasks_of(of_queries, block);
        if (heads == 0 || (forward_.sequences.given ? tasks.empty() : rows == 0)) return;

        const std::vector<Constant> constants =
            of_queries ? without({constant::has_lse, constant::out_kind, constant::has_dlse,
                                  constant::wants_dk, constant::wants_dv, constant::dk_kind,
                                  constant::dv_kind})
                       : without({constant::has_lse, constant::out_kind, constant::has_dlse,
                                  constant::dq_kind, constant::wants_dq, constant::wants_dslopes,
                                  constant::wants_dqv, constant::dqv_kind});
        LaunchBuilder builder(plan_, forward_.function, constants,
                              stem + "_" + type_.name + "_d" + std::to_string(shape.d) + "_v" +
                                  std::to_string(shape.dv) + (of_queries ? "_k" : "_q") +
                                  std::to_string(shape.tile) + simdgroups.suffix,
                              "backward.metal", UMFA_BACKWARD_BUFFERS);
        builder.macro("UMFA_OF", "umfa_" + stem)
            .computes(type_)
            .shape(shape.d, shape.dv, shape.tile, shape.rows, shape.simdgroups, shape.split,
                   shape.one_tile)
            .tensors(layout)
            .scratch(UMFA_BACKWARD_STATISTICS, statistics_)
            .params(UMFA_BACKWARD_PARAMS, params_)
            .grid(ceil_div(rows, block), heads, forward_.batch)
            .simdgroups(shape.simdgroups)
            .threadgroup_bytes((of_queries ? dq_bytes : dkv_bytes)(
                shape.d, shape.dv, shape.tile, shape.rows, shape.simdgroups, shape.split,
                shape.one_tile, type_.staged_bytes));
        if (of_queries) builder.tensor({UMFA_BACKWARD_DQ, "dq"}).tensor({UMFA_BACKWARD_DQV, "dqv"});
        if (of_queries && results_.alibi_slopes)
            builder.scratch(UMFA_BACKWARD_SLOPE_TERMS, slope_terms_);
        if (!of_queries) builder.tensor({UMFA_BACKWARD_DK, "dk"}).tensor({UMFA_BACKWARD_DV, "dv"});
        if (sequences_)
            builder.data(UMFA_BACKWARD_SEQUENCES, sequences_)
                .new_data(UMFA_BACKWARD_TASKS, tasks)
                .grid(static_cast<int64_t>(tasks.size()), heads);
        const auto seconds = [&](double others) {
            return block_seconds(shape, block, others, of_queries);
        };
        const int64_t others = of_queries ? forward_.seqlen_kv : forward_.seqlen_q;
        builder.add(
            slices_of(builder.grid(), seconds(static_cast<double>(others)), gpu_, [&](uint32_t x) {
                const SequenceTask task =
                    sequences_ ? tasks[x] : SequenceTask{0, static_cast<int32_t>(x) * block, 0, 0};
                return seconds(read_by(task, block, of_queries));
            }));
    }

    /// Keys that a block of queries reads, or queries that a block of keys reads.
    double read_by(const SequenceTask& task, int block, bool of_queries) const {
        const SequenceRows rows = forward_.sequence(task.sequence);
        const Visible<int64_t> visible = forward_.visible_of(rows);
        const int64_t first = task.first_row;
        if (of_queries) {
            const int64_t last = std::min(first + block, rows.seqlen_q) - 1;
            return static_cast<double>(
                std::max<int64_t>(0, span_end(visible, last) - span_begin(visible, first)));
        }
        const SeenBounds<int64_t> bounds =
            seer_bounds(seers(visible, rows.seqlen_q), visible.prefix, first,
                        std::min(first + block, rows.seqlen_kv) - 1);
        return static_cast<double>(std::max<int64_t>(0, bounds.some_end - bounds.some_begin));
    }

    /// The work of a threadgroup whose rows read so many others, in seconds of one core: three
    /// products for dQ; four for dK and dV, of each head of the group.
    double block_seconds(const Shape& shape, int block, double others, bool of_queries) const {
        const double of_values = forward_.qv ? 3.0 * shape.dv : shape.dv;
        const double channels =
            of_queries ? 2.0 * shape.d + of_values
                       : params_.forward.group * (2.0 * shape.d + shape.dv + of_values);
        return core_seconds({2.0 * block * others * channels, 0}, gpu_);
    }

    const BackwardProblem& problem_;
    const Problem& forward_;
    const BackwardResults& results_;
    const Capabilities& gpu_;
    const bool one_dtype_;  // else the kernels are those of float
    const ElementType type_;
    LaunchPlan plan_;
    std::vector<Constant> constants_;
    BackwardParams params_{};
    uint32_t statistics_ = 0, slope_terms_ = 0;  // pieces of scratch
    double lowered_ = 1;                         // takes back what raises P
    int sink_kind_ = UMFA_MASK_NONE;
    std::optional<uint32_t> sequences_;
};

}  // namespace

Verdict can_plan_backward(const BackwardProblem& problem) {
    if (const uint32_t missing = problem.features() & ~backward_features)
        return {false, std::string(name_of(static_cast<Feature>(missing & -missing))) +
                           " is not implemented in a backward pass"};
    return {};
}

LaunchPlan plan_backward(const BackwardProblem& problem, const BackwardResults& results,
                         const Capabilities& gpu) {
    return BackwardPlanner(problem, results, gpu).plan();
}

}  // namespace umfa::metal
