#include "metal/plan_tables.h"

#include <algorithm>
#include <array>

#include "metal/launch_builder.h"
#include "metal/plan_append.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

constexpr std::array<Slot, table_count> layout = {{
    {UMFA_SEQUENCES_CU_SEQLENS_Q, "cu_seqlens_q"},
    {UMFA_SEQUENCES_CU_SEQLENS_K, "cu_seqlens_k"},
    {UMFA_SEQUENCES_SEQUSED_Q, "seqused_q"},
    {UMFA_SEQUENCES_SEQUSED_K, "seqused_k"},
    {UMFA_SEQUENCES_CACHE_BATCH_IDX, "cache_batch_idx"},
    {UMFA_SEQUENCES_CACHE_LEFTPAD, "cache_leftpad"},
    {UMFA_SEQUENCES_BLOCK_TABLE, "block_table"},
    {UMFA_SEQUENCES_PREFIX_LENS, "prefix_lens"},
    {UMFA_SEQUENCES_CU_SEQLENS_K_NEW, "cu_seqlens_k_new"},
    {UMFA_SEQUENCES_ROTARY_SEQLENS, "rotary_seqlens"},
}};
static_assert(table_count == UMFA_SEQUENCES_TABLES);
static_assert(sizeof(TableFault) == UMFA_FAULT_WORDS * sizeof(int64_t));

constexpr bool in_order() {
    constexpr Field fields[] = {
#define UMFA_TABLE(name, text) Field::name,
#include "core/options.def"
    };
    constexpr Field slots[] = {
        Field::cu_seqlens_q,     Field::cu_seqlens_k,  Field::seqused_q,   Field::seqused_k,
        Field::cache_batch_idx,  Field::cache_leftpad, Field::block_table, Field::prefix_lens,
        Field::cu_seqlens_k_new, Field::rotary_seqlens};
    for (size_t i = 0; i < table_count; ++i)
        if (fields[i] != slots[i] || layout[i].index != i) return false;
    return true;
}
static_assert(in_order(), "DeviceTables::views are in the order of the kernel's buffers");

/// Threads of the threadgroup: sums over sequences take a step for each doubling.
constexpr int simdgroups = 16;

const DeviceTables& tables_of(const Problem& problem) { return *problem.sequences.tables; }
const TensorView* view_of(const Problem& problem, size_t table) {
    const auto& view = tables_of(problem).views[table];
    return view ? &*view : nullptr;
}

/// Whether a table is in host memory, though the call's tensors are not: then it is data of the plan.
bool on_host(const Problem& problem, const TensorView& view) {
    return view.device == Device::cpu && problem.query.view.device != Device::cpu;
}

/// A table's numbers in int32. What does not fit is no number of rows or pages either.
std::vector<int32_t> numbers_of(const TensorView& view) {
    std::vector<int32_t> numbers;
    const int64_t columns = view.ndim > 1 ? view.shape[1] : 1;
    for (int64_t row = 0; row < view.shape[0]; ++row)
        for (int64_t column = 0; column < columns; ++column)
            numbers.push_back(static_cast<int32_t>(
                std::clamp<int64_t>(integer_at(view, row, column), INT32_MIN, INT32_MAX)));
    if (numbers.empty()) numbers.push_back(0);  // Metal has no empty buffers
    return numbers;
}

Binding add_scratch_for(LaunchPlan& plan, int64_t count, size_t bytes) {
    return {0, Binding::Kind::scratch,
            add_scratch(plan, static_cast<uint64_t>(std::max<int64_t>(count, 1)) * bytes), 0};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks of rows of all sequences, at most. Packed ones share the rows of the tensor.
int64_t most_blocks(const Problem& problem, const TaskShape& shape) {
    const int64_t each = problem.batch * ceil_div(shape.group * problem.seqlen_q, shape.block);
    if (!view_of(problem, UMFA_SEQUENCES_CU_SEQLENS_Q)) return each;
    return std::min(each, shape.group * problem.query_rows / shape.block + problem.batch);
}

/// Tasks of all sequences, at most. With umfa's own splits a sequence has one for each piece of the
/// keys that fills the GPU, and one more: work / each + 1, where each >= work / threadgroups or no
/// sequence is longer.
int64_t most_tasks(const Problem& problem, const TaskShape& shape) {
    const int64_t blocks = most_blocks(problem, shape), all = blocks * shape.most_splits;
    if (shape.splits != 0) return all;
    const int64_t filling = ceil_div(shape.threadgroups, std::max<int64_t>(problem.nheads_kv, 1));
    return std::min(all, blocks + std::max(blocks, filling));
}

/// Of a sequence's first query and new key, so that the last one has an angle.
int64_t last_position(const Problem& problem) {
    if (!problem.rotary) return INT32_MAX;
    const int64_t queries =
        problem.rotary->advances ? problem.seqlen_q : std::min<int64_t>(problem.seqlen_q, 1);
    const int64_t rows = std::max(queries, tables_of(problem).new_rows);
    return problem.rotary->cos.shape[0] - rows;
}

SequencesParams sequences_params(const Problem& problem, const TaskShape& shape) {
    const DeviceTables& tables = tables_of(problem);
    SequencesParams params{};
    for (size_t i = 0; i < table_count; ++i) {
        const TensorView* view = view_of(problem, i);
        if (!view) continue;
        const bool copied = on_host(problem, *view);
        const int64_t columns = view->ndim > 1 ? view->shape[1] : 1;
        params.tables[i].row = copied ? columns : view->strides[0];
        params.tables[i].column = copied ? 1 : view->ndim > 1 ? view->strides[1] : 0;
        params.tables[i].kind =
            copied || view->dtype == DType::i32 ? UMFA_TABLE_I32 : UMFA_TABLE_I64;
    }
    const TensorView* pages = view_of(problem, UMFA_SEQUENCES_BLOCK_TABLE);
    params.query_rows = tables.query_rows;
    params.key_rows = tables.key_rows;
    params.kv_batch = tables.kv_batch;
    params.table_rows = pages ? pages->shape[0] : 0;
    params.most_q = tables.most_q;
    params.most_kv = tables.most_kv;
    params.batch = static_cast<int32_t>(problem.batch);
    params.page_size = static_cast<int32_t>(problem.page_size);
    params.pages = static_cast<int32_t>(problem.sequences.pages_per_sequence);
    params.top_left = problem.top_left ? 1 : 0;
    params.visibility = narrowed(problem.visible);
    params.group = static_cast<int32_t>(shape.group);
    params.block = static_cast<int32_t>(shape.block);
    params.alignment = static_cast<int32_t>(shape.alignment);
    params.round = static_cast<int32_t>(shape.round);
    params.splits = static_cast<int32_t>(shape.splits);
    params.least_keys = static_cast<int32_t>(shape.least_keys);
    params.threadgroups = static_cast<int32_t>(shape.threadgroups);
    if (problem.append) {
        params.new_rows = static_cast<int32_t>(tables.new_rows);
        params.append_block = append_rows_per_threadgroup;
        params.new_pieces = static_cast<int32_t>(tables.new_pieces);
        params.check_shared = tables.checks_shared ? 1 : 0;
    }
    params.last_position = last_position(problem);
    params.heads = static_cast<int32_t>(problem.nheads_q);
    params.heads_kv = static_cast<int32_t>(problem.nheads_kv);
    return params;
}

}  // namespace

TablePlaces plan_tables(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                        const Capabilities& gpu, const TaskShape& shape) {
    TablePlaces found;
    found.task_count = most_tasks(problem, shape);
    if (shape.merges)
        found.row_count = view_of(problem, UMFA_SEQUENCES_CU_SEQLENS_Q)
                              ? std::min(problem.query_rows, problem.batch * problem.seqlen_q)
                              : problem.batch * problem.seqlen_q;
    found.places = add_scratch_for(plan, problem.batch, sizeof(SequenceParams));
    found.tasks = add_scratch_for(plan, found.task_count, sizeof(SequenceTask));
    found.rows = add_scratch_for(plan, found.row_count, sizeof(SequenceTask));
    if (problem.append)
        found.append_count =
            problem.batch * ceil_div(tables_of(problem).new_rows, append_rows_per_threadgroup);
    found.appends = add_scratch_for(plan, found.append_count, sizeof(AppendTask));
    const Binding pages = add_scratch_for(
        plan, problem.batch * problem.sequences.pages_per_sequence, sizeof(int32_t));
    if (problem.page_size > 0) found.pages = pages;

    SequencesParams params = sequences_params(problem, shape);
    params.task_count = static_cast<int32_t>(found.task_count);
    params.row_count = static_cast<int32_t>(found.row_count);
    const Simdgroups threads = fit_simdgroups(simdgroups, 1, gpu);
    LaunchBuilder builder(plan, problem.function, zero_constants(), "tables" + threads.suffix,
                          "sequences.metal", UMFA_SEQUENCES_BUFFERS);
    builder.shape(32 * threads.count)
        .tensors(layout)
        .tensor({UMFA_SEQUENCES_FAULT, "table_fault"})
        .piece(UMFA_SEQUENCES_PLACES, found.places)
        .piece(UMFA_SEQUENCES_TASKS, found.tasks)
        .piece(UMFA_SEQUENCES_ROWS, found.rows)
        .piece(UMFA_SEQUENCES_PAGES, pages)
        .piece(UMFA_SEQUENCES_APPENDS, found.appends)
        .params(UMFA_SEQUENCES_PARAMS, params)
        .grid(1, 1)
        .simdgroups(threads.count);
    const uint32_t nothing = add_data(plan, std::vector<int64_t>{0});
    for (size_t i = 0; i < table_count; ++i) {
        const TensorView* view = view_of(problem, i);
        if (!view)
            builder.data(static_cast<uint32_t>(i), nothing);
        else if (on_host(problem, *view))
            builder.new_data(static_cast<uint32_t>(i), numbers_of(*view));
    }
    builder.add();
    if (problem.append) plan_append(plan, problem, results, found);
    return found;
}

void add_tables(LaunchPlan& plan, const Problem& problem) {
    for (size_t i = 0; i < table_count; ++i)
        if (const TensorView* view = view_of(problem, i); view && !on_host(problem, *view))
            plan.tensors.push_back({layout[i].tensor, *view});
    TensorView fault;  // the executor's
    fault.ndim = 1;
    fault.shape[0] = UMFA_FAULT_WORDS;
    fault.strides[0] = 1;
    fault.dtype = DType::i64;
    fault.device = problem.query.view.device;
    fault.device_id = problem.query.view.device_id;
    fault.data = tables_of(problem).fault;
    plan.tensors.push_back({"table_fault", fault, true, true});
}

void plan_clear_all(LaunchPlan& plan, const Problem& problem, const ForwardResults& results) {
    if (!view_of(problem, UMFA_SEQUENCES_CU_SEQLENS_Q) &&
        !view_of(problem, UMFA_SEQUENCES_SEQUSED_Q))
        return;
    const int64_t batches = problem.ndim == 4 ? problem.batch_shape[0] : 1;
    if (batches == 0 || problem.query_rows == 0 || problem.nheads_q == 0) return;
    ClearParams params{};
    params.out = strides_of(results.out);
    if (results.lse) params.lse = strides_of(*results.lse);
    params.head_dim_v = static_cast<int32_t>(problem.head_dim_v);
    params.rows = static_cast<int32_t>(problem.query_rows);
    const ElementType type = stored_type(results.out.view.dtype);
    LaunchBuilder(plan, problem.function, constants_of(problem, results),
                  std::string("clear_") + type.name, "clear.metal", UMFA_CLEAR_BUFFERS)
        .stores(type)
        .tensor({UMFA_CLEAR_OUT, "out"})
        .tensor({UMFA_CLEAR_LSE, "lse"})
        .new_data(UMFA_CLEAR_ROWS, std::vector<UnusedRows>(1))
        .params(UMFA_CLEAR_PARAMS, params)
        .grid(ceil_div(problem.query_rows, UMFA_CLEARED_ROWS), problem.nheads_q, batches)
        .simdgroups(4)
        .add();
}

}  // namespace umfa::metal
