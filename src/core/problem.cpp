#include "core/problem.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/error.h"

namespace umfa {
namespace {

constexpr double log2_e = 1.4426950408889634;

struct Checker {
    std::string_view function;

    [[noreturn]] void value(std::string_view what, const std::string& got,
                            const std::string& expected) const {
        fail(ErrorKind::value, function, what, got, expected);
    }
    [[noreturn]] void type(std::string_view what, const std::string& got,
                           const std::string& expected) const {
        fail(ErrorKind::type, function, what, got, expected);
    }
    [[noreturn]] void unsupported(std::string_view what, const std::string& got,
                                  const std::string& expected) const {
        fail(ErrorKind::unsupported, function, what, got, expected);
    }
};

std::string dims_text(Layout layout, bool broadcasts) {
    if (broadcasts) return "at least 2: (..., nheads, seqlen, head_dim)";
    return layout == Layout::bshd ? "4: (batch, seqlen, nheads, head_dim)"
                                  : "4: (batch, nheads, seqlen, head_dim)";
}

/// Span of bytes that a view touches, as [begin, end) offsets from element (0, ..., 0).
/// False when the arithmetic leaves 64 bits.
bool extent(const TensorView& view, int64_t& begin, int64_t& end) {
    begin = end = 0;
    if (view.size() == 0) return true;
    int64_t low = 0, high = 0;
    for (int i = 0; i < view.ndim; ++i) {
        int64_t reach = 0;
        if (__builtin_mul_overflow(view.shape[i] - 1, view.strides[i], &reach)) return false;
        if (__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high))
            return false;
    }
    const int64_t bytes = bits_of(view.dtype) / 8;
    return !__builtin_add_overflow(high, int64_t{1}, &high) &&
           !__builtin_mul_overflow(low, bytes, &begin) &&
           !__builtin_mul_overflow(high, bytes, &end);
}

/// What every tensor must satisfy before anyone follows its pointer.
void check_memory(const Checker& check, const TensorView& view, const std::string& name) {
    int64_t begin = 0, end = 0;
    if (!extent(view, begin, end)) {
        std::string strides;
        for (int i = 0; i < view.ndim; ++i)
            strides += (i ? ", " : "") + std::to_string(view.strides[i]);
        check.value(name + " reaches past 64-bit addresses",
                    "shape " + shape_text(view) + " with strides (" + strides + ")",
                    "strides in elements of a tensor in memory");
    }
    if (view.size() == 0) return;
    if (view.data == nullptr)
        check.value(name + " has no memory", "a null pointer with shape " + shape_text(view),
                    "the tensor's data");
    const uint64_t bytes = static_cast<uint64_t>(bits_of(view.dtype) / 8);
    const uint64_t start =
        view.device == Device::cpu ? reinterpret_cast<uint64_t>(view.address()) : view.byte_offset;
    if (start % bytes != 0)
        check.value(
            name + " is not aligned to its " + std::to_string(bytes) + "-byte elements",
            (view.device == Device::cpu ? "address " : "byte offset ") + std::to_string(start),
            "a multiple of " + std::to_string(bytes) + "; make a copy");
}

void check_float_dtype(const Checker& check, const TensorView& view, const std::string& name) {
    if (is_attention_dtype(view.dtype)) return;
    const std::string what = name + " has the wrong dtype",
                      expected = "float32, float16 or bfloat16";
    if (is_other_float(view.dtype)) check.unsupported(what, name_of(view.dtype), expected);
    check.type(what, name_of(view.dtype), expected);
}

// Dimensions are counted from the last: 1 is the last one. One that is not there has size 1.
int64_t size_at(const TensorView& view, int from_last) {
    return from_last <= view.ndim ? view.shape[view.ndim - from_last] : 1;
}

/// 0 where there is one index only, so that the dimension may broadcast.
int64_t stride_at(const TensorView& view, int from_last) {
    return size_at(view, from_last) == 1 ? 0 : view.strides[view.ndim - from_last];
}

int row_of(Layout layout) { return layout == Layout::bshd ? 3 : 2; }
int head_of(Layout layout) { return layout == Layout::bshd ? 2 : 3; }

/// The strides but that of the batch, which Problem::merge_batch() finds.
Operand operand_of(const TensorView& view, Layout layout) {
    Operand operand;
    operand.view = view;
    operand.stride_head = stride_at(view, head_of(layout));
    operand.stride_row = view.strides[view.ndim - row_of(layout)];
    operand.stride_channel = view.strides[view.ndim - 1];
    return operand;
}

void check_overlap(const Checker& check, const TensorView& written, const std::string& name,
                   const TensorView& read, const std::string& other) {
    if (written.device != Device::cpu || read.device != Device::cpu) return;
    if (written.size() == 0 || read.size() == 0) return;
    int64_t begin = 0, end = 0, other_begin = 0, other_end = 0;
    extent(written, begin, end);
    extent(read, other_begin, other_end);
    const char *a = written.address(), *b = read.address();
    if (a + begin < b + other_end && b + other_begin < a + end)
        check.value(name + " overlaps " + other + " in memory", "overlapping ranges of addresses",
                    "memory of its own, since " + other + " is still being read");
}

/// True when no two indices may name the same element: sorted by stride, each dimension steps over
/// everything the smaller ones reach. Sufficient, and exact for every view made by slicing.
bool elements_distinct(const TensorView& view) {
    int order[TensorView::max_ndim];
    int count = 0;
    for (int i = 0; i < view.ndim; ++i) {
        if (view.shape[i] == 0) return true;
        if (view.shape[i] == 1) continue;
        int at = count++;
        for (; at > 0 && std::abs(view.strides[order[at - 1]]) > std::abs(view.strides[i]); --at)
            order[at] = order[at - 1];
        order[at] = i;
    }
    int64_t reach = 0;
    for (int i = 0; i < count; ++i) {
        const int64_t stride = std::abs(view.strides[order[i]]);
        if (stride <= reach) return false;
        reach += (view.shape[order[i]] - 1) * stride;
    }
    return true;
}

/// Whether two views are slices of one tensor that lie between one another without touching, as key
/// and value of a cache that holds both.
bool interleaved(const TensorView& a, const TensorView& b) {
    if (a.ndim != b.ndim || a.ndim >= TensorView::max_ndim || a.dtype != b.dtype) return false;
    TensorView both = a;
    for (int i = 0; i < a.ndim; ++i) {
        if (a.strides[i] != b.strides[i]) return false;
        both.shape[i] = std::max(a.shape[i], b.shape[i]);
    }
    both.shape[a.ndim] = 2;
    both.strides[a.ndim] = (b.address() - a.address()) / (bits_of(a.dtype) / 8);
    ++both.ndim;
    return elements_distinct(both);
}

void check_writable(const Checker& check, const Problem& problem, const TensorView& view,
                    const TensorView& shape, const std::string& name) {
    bool same = view.ndim == shape.ndim;
    for (int i = 0; same && i < view.ndim; ++i) same = view.shape[i] == shape.shape[i];
    if (!same) check.value(name + " has the wrong shape", shape_text(view), shape_text(shape));
    if (view.dtype != shape.dtype)
        check.type(name + " has the wrong dtype", name_of(view.dtype), name_of(shape.dtype));
    if (view.device != shape.device || view.device_id != shape.device_id)
        check.value(name + " is on another device", device_text(view), device_text(shape));
    check_memory(check, view, name);
    if (!elements_distinct(view))
        check.value(name + " has elements that share memory", "an expanded or overlapping view",
                    "one address for each element");
    check_overlap(check, view, name, problem.query.view, std::string(problem.query_name));
    check_overlap(check, view, name, problem.key.view, std::string(problem.key_name));
    check_overlap(check, view, name, problem.value.view, std::string(problem.value_name));
    if (problem.alibi) check_overlap(check, view, name, problem.alibi->view, "alibi_slopes");
    if (problem.mask) check_overlap(check, view, name, problem.mask->given, "attn_mask");
    if (problem.sinks) check_overlap(check, view, name, problem.sinks->logits, "learnable_sink");
    if (problem.append) {
        check_overlap(check, view, name, problem.append->key.view, "k");
        check_overlap(check, view, name, problem.append->value.view, "v");
    }
}

/// The mask as (batch, nheads, seqlen_q, seqlen_kv), with stride 0 where it broadcasts; the batch is
/// left to Problem::merge_batch().
DenseMask broadcast_mask(const Checker& check, const Problem& problem, const TensorView& mask) {
    TensorView full = mask;
    full.ndim = problem.ndim;
    std::copy_n(problem.batch_shape, TensorView::max_ndim, full.shape);
    if (full.ndim >= 3) full.shape[full.ndim - 3] = problem.nheads_q;
    full.shape[full.ndim - 2] = problem.seqlen_q;
    full.shape[full.ndim - 1] = problem.seqlen_kv;
    bool fits = mask.ndim <= full.ndim;
    for (int i = 1; fits && i <= full.ndim; ++i)
        fits = size_at(mask, i) == 1 || size_at(mask, i) == size_at(full, i);
    if (!fits)
        check.value("attn_mask has the wrong shape", shape_text(mask),
                    "a shape that broadcasts to " + shape_text(full));
    DenseMask found{mask, mask};
    found.view.ndim = 4;
    found.view.shape[1] = problem.nheads_q;
    found.view.shape[2] = problem.seqlen_q;
    found.view.shape[3] = problem.seqlen_kv;
    for (int i = 1; i <= 3; ++i) found.view.strides[4 - i] = stride_at(mask, i);
    if (mask.dtype != DType::b8 && !is_attention_dtype(mask.dtype)) {
        const char *what = "attn_mask has the wrong dtype",
                   *expected = "bool, float32, float16 or bfloat16";
        if (is_other_float(mask.dtype)) check.unsupported(what, name_of(mask.dtype), expected);
        check.type(what, name_of(mask.dtype), expected);
    }
    const TensorView& query = problem.query.view;
    if (mask.device != query.device || mask.device_id != query.device_id)
        check.value("attn_mask is on another device", device_text(mask), device_text(query));
    check_memory(check, mask, "attn_mask");
    return found;
}

/// New rows of key and value, as one index of the batch after the other.
Append checked_append(const Checker& check, const Problem& problem,
                      const AttentionRequest& request) {
    const TensorView &k = *request.new_key, &v = *request.new_value;
    const struct {
        const TensorView &view, &cache;
        const char* name;
        std::string_view cache_name;
    } pairs[] = {{k, request.key, "k", request.key_name},
                 {v, request.value, "v", request.value_name}};
    for (const auto& [view, cache, name, cache_name] : pairs) {
        if (view.ndim != 4 || view.shape[0] != problem.batch_shape[0] ||
            view.shape[1] != k.shape[1] || view.shape[2] != problem.nheads_kv ||
            view.shape[3] != cache.shape[3])
            check.value(std::string(name) + " has the wrong shape", shape_text(view),
                        "(" + std::to_string(problem.batch_shape[0]) + ", new rows, " +
                            std::to_string(problem.nheads_kv) + ", " +
                            std::to_string(cache.shape[3]) + ")");
        if (view.dtype != cache.dtype)
            check.type(std::string(name) + " has the wrong dtype", name_of(view.dtype),
                       name_of(cache.dtype));
        if (view.device != cache.device || view.device_id != cache.device_id)
            check.value(std::string(name) + " is on another device", device_text(view),
                        device_text(cache));
        check_memory(check, view, name);
        if (!elements_distinct(cache))
            check.value(std::string(cache_name) + " has elements that share memory",
                        "an expanded or overlapping view", "one address for each element");
        check_overlap(check, cache, std::string(cache_name), k, "k");
        check_overlap(check, cache, std::string(cache_name), v, "v");
        check_overlap(check, cache, std::string(cache_name), request.query,
                      std::string(request.query_name));
    }
    if (!interleaved(request.key, request.value))
        check_overlap(check, request.key, std::string(request.key_name), request.value,
                      std::string(request.value_name));
    Append append{operand_of(k, Layout::bshd), operand_of(v, Layout::bshd), k.shape[1]};
    append.key.stride_batch = stride_at(k, 4);
    append.value.stride_batch = stride_at(v, 4);
    return append;
}

Rotary checked_rotary(const Checker& check, const Problem& problem,
                      const AttentionRequest& request) {
    if (!request.rotary_cos || !request.rotary_sin)
        check.value("rotary_cos and rotary_sin must be given together",
                    request.rotary_cos ? "rotary_cos alone" : "rotary_sin alone",
                    "both or neither");
    // New keys are rotated on their way into the cache, which holds the others rotated already.
    const bool keys = !request.new_key;
    const bool advances = keys || problem.causal || problem.visible.left >= 0 ||
                          problem.visible.right >= 0 || problem.visible.chunk > 0;
    Rotary rotary{
        *request.rotary_cos, *request.rotary_sin, 0, request.rotary_interleaved, advances, keys};
    const int64_t appended = problem.append ? problem.append->rows : 0;
    const auto reach = [&](int64_t queries) {
        return std::max(appended, advances ? queries : std::min<int64_t>(queries, 1));
    };
    int64_t positions = keys ? problem.seqlen_kv : 0;
    for (const SequenceRows& rows : problem.sequences.rows)
        positions = std::max(positions, rows.position_q + reach(rows.seqlen_q));
    if (keys && problem.seqlen_q > problem.seqlen_kv)
        check.value("rotary angles need a position for each query",
                    std::to_string(problem.seqlen_q) + " queries of " +
                        std::to_string(problem.seqlen_kv) + " keys",
                    "no more queries than keys: the last query stands where the last key does");
    const struct {
        const TensorView& view;
        const char* name;
    } tables[] = {{rotary.cos, "rotary_cos"}, {rotary.sin, "rotary_sin"}};
    for (const auto& [view, name] : tables) {
        const bool fits = view.ndim == 2 && view.shape[1] >= 1 &&
                          view.shape[1] * 2 <= problem.head_dim &&
                          view.shape[1] == rotary.cos.shape[1];
        if (!fits)
            check.value(std::string(name) + " has the wrong shape", shape_text(view),
                        "(positions, half of the rotated channels), at most " +
                            std::to_string(problem.head_dim / 2) + " of them");
        if (view.shape[0] < positions)
            check.value(std::string(name) + " has too few positions", std::to_string(view.shape[0]),
                        "at least " + std::to_string(positions));
        check_float_dtype(check, view, name);
        if (view.dtype != rotary.cos.dtype)
            check.type("dtype differs: rotary_cos has " + std::string(name_of(rotary.cos.dtype)) +
                           ", " + name + " has " + name_of(view.dtype),
                       name_of(view.dtype), name_of(rotary.cos.dtype));
        if (view.device != request.query.device || view.device_id != request.query.device_id)
            check.value(std::string(name) + " is on another device", device_text(view),
                        device_text(request.query));
        check_memory(check, view, name);
    }
    rotary.channels = rotary.cos.shape[1] * 2;
    return rotary;
}

void check_window(const Checker& check, const char* side, int64_t width) {
    if (width < -1 || width > max_seqlen)
        check.value(std::string("window_size ") + side + " is out of range", std::to_string(width),
                    "-1 (unbounded) or 0 to " + std::to_string(max_seqlen));
}

}  // namespace

const char* name_of(Feature feature) {
    switch (feature) {
        case Feature::causal: return "causal";
        case Feature::window: return "window_size";
        case Feature::softcap: return "softcap";
        case Feature::alibi: return "alibi_slopes";
        case Feature::lse: return "softmax_lse";
        case Feature::gqa: return "grouped-query attention";
        case Feature::mask: return "attn_mask";
        case Feature::sinks: return "learnable_sink";
        case Feature::block_mask: return "block_mask";
        case Feature::score_program: return "score_mod";
        case Feature::varlen: return "a table of sequences (cu_seqlens, cache_seqlens)";
        case Feature::paged_kv: return "block_table";
        case Feature::dropout: return "dropout_p";
        case Feature::quantised: return "quantised operands";
        case Feature::attention_chunk: return "attention_chunk";
        case Feature::append: return "appending to the cache";
        case Feature::rotary: return "rotary_cos";
    }
    return "unknown";
}

Problem Problem::make(const AttentionRequest& request) {
    const Checker check{request.function};
    Problem problem;
    problem.function = request.function;
    problem.query_name = request.query_name;
    problem.key_name = request.key_name;
    problem.value_name = request.value_name;
    problem.layout = request.layout;

    // Each tensor on its own.
    const std::string q_name(request.query_name), k_name(request.key_name),
        v_name(request.value_name);
    const struct {
        const TensorView& view;
        const std::string& name;
    } inputs[] = {{request.query, q_name}, {request.key, k_name}, {request.value, v_name}};
    const SequenceTables& tables = request.tables;
    for (const auto& [view, name] : inputs) {
        const bool packed = &view == &request.query ? tables.cu_seqlens_q.has_value()
                                                    : tables.cu_seqlens_k && !tables.block_table;
        if (request.broadcasts ? view.ndim < 2 : view.ndim != (packed ? 3 : 4))
            check.value(name + " has " + std::to_string(view.ndim) + " dimensions",
                        "shape " + shape_text(view),
                        packed ? "3: (total, nheads, head_dim)"
                               : dims_text(request.layout, request.broadcasts));
        check_float_dtype(check, view, name);
        check_memory(check, view, name);
    }

    // The three together.
    const TensorView &q = request.query, &k = request.key, &v = request.value;
    for (const auto& [view, name] : inputs) {
        if (view.dtype != q.dtype)
            check.type("dtype differs: " + q_name + " has " + name_of(q.dtype) + ", " + name +
                           " has " + name_of(view.dtype),
                       name_of(view.dtype), name_of(q.dtype));
        if (view.device != q.device || view.device_id != q.device_id)
            check.value("device differs: " + q_name + " is on " + device_text(q) + ", " + name +
                            " on " + device_text(view),
                        device_text(view), device_text(q));
    }
    const int row = row_of(request.layout), head = head_of(request.layout);
    const auto differ = [&](const std::string& what, const TensorView& a, const std::string& a_name,
                            const TensorView& b, const std::string& b_name, int dimension,
                            const std::string& expected) {
        check.value(what + " differs: " + a_name + " has " + std::to_string(size_at(a, dimension)) +
                        ", " + b_name + " has " + std::to_string(size_at(b, dimension)),
                    q_name + " " + shape_text(q) + ", " + k_name + " " + shape_text(k) + ", " +
                        v_name + " " + shape_text(v),
                    expected);
    };
    const auto same = [&](const char* what, const TensorView& a, const std::string& a_name,
                          const TensorView& b, const std::string& b_name, int dimension) {
        if (size_at(a, dimension) != size_at(b, dimension))
            differ(what, a, a_name, b, b_name, dimension, std::string("equal ") + what);
    };
    // The size that all of a dimension broadcast to.
    const auto broadcast = [&](const char* what, int dimension, const char* expected) {
        int64_t size = 1;
        const TensorView* first = nullptr;
        const std::string* first_name = nullptr;
        for (const auto& [view, name] : inputs) {
            const int64_t own = size_at(view, dimension);
            if (own == 1) continue;
            if (first && own != size)
                differ(what, *first, *first_name, view, name, dimension, expected);
            first = &view;
            first_name = &name;
            size = own;
        }
        return size;
    };
    problem.ndim = request.broadcasts ? std::max({q.ndim, k.ndim, v.ndim}) : q.ndim;
    if (!request.broadcasts) {
        if (!tables.any()) same("batch", q, q_name, k, k_name, 4);
        same("batch", k, k_name, v, v_name, 4);
        problem.batch_shape[0] = size_at(q, 4);
    }
    for (int i = 0; request.broadcasts && i < problem.ndim - 3; ++i)
        problem.batch_shape[i] = broadcast("batch", problem.ndim - i, "equal batch sizes, or 1");
    same("head_dim", q, q_name, k, k_name, 1);
    if (!request.broadcasts) same("nheads", k, k_name, v, v_name, head);
    same("seqlen", k, k_name, v, v_name, row);

    problem.nheads_q = size_at(q, head);
    problem.nheads_kv = size_at(k, head);
    if (request.broadcasts && !request.grouped) {
        problem.nheads_q =
            broadcast("nheads", head, "equal nheads, or 1; enable_gqa=True lets heads share keys");
        // One key head for all is read as a group, where both have but one.
        if (size_at(k, head) != 1 || size_at(v, head) != 1) problem.nheads_kv = problem.nheads_q;
    } else if (request.broadcasts) {
        problem.nheads_kv = std::max(problem.nheads_kv, size_at(v, head));
        if (size_at(k, head) == 0 || size_at(v, head) == 0) problem.nheads_kv = 0;
        for (const TensorView* view : {&k, &v})
            if (size_at(*view, head) != 1 && size_at(*view, head) != problem.nheads_kv)
                same("nheads", k, k_name, v, v_name, head);
    }
    problem.query_rows = size_at(q, row);
    problem.seqlen_q = problem.query_rows;
    problem.seqlen_kv = size_at(k, row);
    problem.head_dim = size_at(q, 1);
    problem.head_dim_v = size_at(v, 1);
    for (const auto& [dim, name] :
         {std::pair{problem.head_dim, q_name}, {problem.head_dim_v, v_name}}) {
        if (dim < 1)
            check.value("head_dim of " + name + " is too small", std::to_string(dim),
                        "1 to " + std::to_string(max_head_dim));
        if (dim > max_head_dim)
            check.unsupported("head_dim of " + name + " is too large", std::to_string(dim),
                              "1 to " + std::to_string(max_head_dim));
    }
    for (const auto& [length, name] :
         {std::pair{problem.seqlen_q, q_name}, {problem.seqlen_kv, k_name}})
        if (length > max_seqlen)
            check.unsupported("seqlen of " + name + " is too large", std::to_string(length),
                              "at most " + std::to_string(max_seqlen));
    if (request.new_key.has_value() != request.new_value.has_value())
        check.value("k and v must be given together", request.new_key ? "k alone" : "v alone",
                    "both or neither");
    if (request.new_key) problem.append = checked_append(check, problem, request);
    if (tables.any() || problem.append) {
        problem.sequences =
            read_sequences(request.function, tables,
                           {problem.batch_shape[0], problem.query_rows, size_at(k, 4),
                            size_at(k, row), problem.append ? problem.append->rows : 0});
        problem.page_size = tables.block_table ? size_at(k, row) : 0;
        problem.seqlen_q = problem.seqlen_kv = 0;
        for (const SequenceRows& rows : problem.sequences.rows) {
            problem.seqlen_q = std::max(problem.seqlen_q, rows.seqlen_q);
            problem.seqlen_kv = std::max(problem.seqlen_kv, rows.seqlen_kv);
        }
        if (request.attn_mask)
            check.value("attn_mask and tables of sequences exclude each other", "both",
                        "a dense mask over dense tensors");
    }
    const bool divides =
        problem.nheads_kv > 0 ? problem.nheads_q % problem.nheads_kv == 0 : problem.nheads_q == 0;
    if (!divides)  // where nheads broadcasts, it does
        check.value("nheads of " + q_name + " is not a multiple of nheads of " + k_name,
                    std::to_string(problem.nheads_q) + " and " + std::to_string(problem.nheads_kv),
                    "nheads_q % nheads_kv == 0");
    // Expanded tensors that broadcast can ask for more than there are addresses.
    int64_t elements = problem.nheads_q;
    bool fits = !__builtin_mul_overflow(elements, problem.seqlen_q, &elements) &&
                !__builtin_mul_overflow(elements, problem.head_dim_v, &elements);
    for (int i = 0; i < problem.ndim - 3; ++i)
        fits = fits && !__builtin_mul_overflow(elements, problem.batch_shape[i], &elements);
    if (!fits)
        check.value("the result is too large",
                    q_name + " " + shape_text(q) + ", " + k_name + " " + shape_text(k) + ", " +
                        v_name + " " + shape_text(v),
                    "less than 2^63 elements");
    problem.query = operand_of(q, request.layout);
    problem.key = operand_of(k, request.layout);
    problem.value = operand_of(v, request.layout);

    // Numbers.
    problem.softmax_scale =
        request.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
    // Kernels compute with float32, and in powers of two: what they are given must fit.
    if (!std::isfinite(static_cast<float>(problem.score_scale())))
        check.value(std::string(request.scale_name) + " is not a number of float32's range",
                    text_of(problem.softmax_scale), "a finite number below 2e38");
    problem.softcap = request.softcap;
    const bool cap_fits = problem.softcap >= FLT_MIN &&
                          std::isfinite(static_cast<float>(problem.softcap_log2())) &&
                          std::isfinite(static_cast<float>(problem.score_scale()));
    if (problem.softcap != 0 && !cap_fits)
        check.value("softcap is out of range", text_of(problem.softcap),
                    "a number > 0 of float32's range, or 0 for none");
    if (!(request.dropout_p >= 0 && request.dropout_p < 1))
        check.value("dropout_p is out of range", text_of(request.dropout_p), "0 <= dropout_p < 1");
    if (request.dropout_p > 0) problem.dropout = Dropout{request.dropout_p, 0, 0};

    // Visibility. A causal mask is a window whose right edge is the diagonal.
    check_window(check, "left", request.window_left);
    check_window(check, "right", request.window_right);
    if (request.attention_chunk < 0 || request.attention_chunk > max_seqlen)
        check.value("attention_chunk is out of range", std::to_string(request.attention_chunk),
                    "0 (none) to " + std::to_string(max_seqlen));
    problem.causal = request.causal != Causal::none;
    problem.top_left = request.causal == Causal::top_left;
    problem.visible.seqlen_kv = problem.seqlen_kv;
    problem.visible.offset = problem.top_left ? 0 : problem.seqlen_kv - problem.seqlen_q;
    problem.visible.left = request.window_left;
    problem.visible.right = problem.causal ? 0 : request.window_right;
    problem.visible.chunk = request.attention_chunk;

    if (request.alibi_slopes) {
        const TensorView& slopes = *request.alibi_slopes;
        const bool per_head = slopes.ndim == 1 && slopes.shape[0] == problem.nheads_q;
        const int64_t batch =
            tables.any() ? int64_t(problem.sequences.rows.size()) : problem.batch_shape[0];
        const bool per_batch = (problem.ndim == 4 || tables.any()) && slopes.ndim == 2 &&
                               slopes.shape[0] == batch && slopes.shape[1] == problem.nheads_q;
        const std::string heads = std::to_string(problem.nheads_q);
        if (!per_head && !per_batch)
            check.value("alibi_slopes has the wrong shape", shape_text(slopes),
                        "(" + heads + ",) or (" + std::to_string(batch) + ", " + heads + ")");
        if (slopes.dtype != DType::f32)
            check.type("alibi_slopes has the wrong dtype", name_of(slopes.dtype), "float32");
        if (slopes.device != q.device || slopes.device_id != q.device_id)
            check.value("alibi_slopes is on another device", device_text(slopes), device_text(q));
        check_memory(check, slopes, "alibi_slopes");
        problem.alibi =
            Alibi{slopes, per_batch ? slopes.strides[0] : 0, slopes.strides[slopes.ndim - 1]};
    }

    if (request.rotary_cos || request.rotary_sin)
        problem.rotary = checked_rotary(check, problem, request);
    if (request.sinks) {
        const TensorView& sinks = *request.sinks;
        const std::string name = "learnable_sink";
        if (sinks.ndim != 1 || sinks.shape[0] != problem.nheads_q)
            check.value(name + " has the wrong shape", shape_text(sinks),
                        "(" + std::to_string(problem.nheads_q) + ",)");
        check_float_dtype(check, sinks, name);
        if (sinks.device != q.device || sinks.device_id != q.device_id)
            check.value(name + " is on another device", device_text(sinks), device_text(q));
        check_memory(check, sinks, name);
        problem.sinks = Sinks{sinks};
    }
    if (request.attn_mask) problem.mask = broadcast_mask(check, problem, *request.attn_mask);
    problem.merge_batch();

    problem.wants_lse = request.wants_lse || request.lse.has_value();
    if (request.out) problem.set_out(*request.out);
    if (request.lse) problem.set_lse(*request.lse);
    return problem;
}

TensorView Problem::out_shape() const {
    TensorView shape = query.view;
    shape.ndim = ndim;
    std::copy_n(batch_shape, std::max(ndim - 3, 0), shape.shape);
    if (ndim >= 3) shape.shape[ndim - head_of(layout)] = nheads_q;
    shape.shape[ndim - row_of(layout)] = query_rows;
    shape.shape[ndim - 1] = head_dim_v;
    return shape;
}

TensorView Problem::lse_shape() const {
    TensorView shape = out_shape();
    shape.ndim = ndim - 1;
    if (ndim >= 3) shape.shape[ndim - 3] = nheads_q;
    shape.shape[ndim - 2] = query_rows;
    shape.dtype = DType::f32;
    return shape;
}

void Problem::set_out(const TensorView& view) {
    check_writable(Checker{function}, *this, view, out_shape(), "out");
    out = operand_of(view, layout);
    merge_batch();
}

void Problem::set_lse(const TensorView& view) {
    const Checker check{function};
    check_writable(check, *this, view, lse_shape(), "softmax_lse");
    if (out) check_overlap(check, view, "softmax_lse", out->view, "out");
    lse = Operand{view, 0, stride_at(view, 2), view.strides[view.ndim - 1], 0};
    wants_lse = true;
    merge_batch();
}

/// Finds `batch` and `loops` for the operands that are there. Neighbouring batch dimensions are one
/// where, in every operand, a step of the outer is a whole turn of the inner.
void Problem::merge_batch() {
    if (sequences.given) {  // each says itself which index of which tensor it is
        batch = static_cast<int64_t>(sequences.rows.size());
        query.stride_batch = stride_at(query.view, 4);
        key.stride_batch = stride_at(key.view, 4);
        value.stride_batch = stride_at(value.view, 4);
        if (out) out->stride_batch = stride_at(out->view, 4);
        if (lse) lse->stride_batch = stride_at(lse->view, 3);
        return;
    }
    std::vector<BatchLoop> groups;
    batch = 1;
    for (int i = 0; i < ndim - 3; ++i) {
        const int from_last = ndim - i;  // in tensors with 3 dimensions behind the batch
        BatchLoop one;
        one.size = batch_shape[i];
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
    const auto move = [](TensorView& view, int64_t elements) {
        if (view.size() == 0) return;
        const int64_t bytes = elements * (bits_of(view.dtype) / 8);
        if (view.device == Device::cpu)
            view.data = static_cast<char*>(view.data) + bytes;
        else
            view.byte_offset += static_cast<uint64_t>(bytes);
    };
    for (size_t i = loops.size(); i-- > 0; index /= loops[i].size) {
        const BatchLoop& loop = loops[i];
        const int64_t at = index % loop.size;
        move(one.query.view, at * loop.query);
        move(one.key.view, at * loop.key);
        move(one.value.view, at * loop.value);
        if (one.mask) move(one.mask->view, at * loop.mask);
        if (one.out) move(one.out->view, at * loop.out);
        if (one.lse) move(one.lse->view, at * loop.lse);
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

SequenceRows Problem::sequence(int64_t b) const {
    if (sequences.given) return sequences.rows[static_cast<size_t>(b)];
    return {b, 0, b, 0, seqlen_q, seqlen_kv, seqlen_kv - seqlen_q};
}

Visible<int64_t> Problem::visible_of(const SequenceRows& rows) const {
    Visible<int64_t> own = visible;
    own.seqlen_kv = rows.seqlen_kv;
    own.offset = top_left ? 0 : rows.seqlen_kv - rows.seqlen_q;
    return own;
}

double Problem::score_scale() const {
    return softcap > 0 ? softmax_scale / softcap : softmax_scale * log2_e;
}

double Problem::softcap_log2() const { return softcap * log2_e; }

uint32_t Problem::features() const {
    uint32_t set = 0;
    const auto add = [&](Feature feature, bool used) {
        if (used) set |= bit(feature);
    };
    add(Feature::causal, causal);
    add(Feature::window, visible.left >= 0 || (!causal && visible.right >= 0));
    add(Feature::softcap, softcap > 0);
    add(Feature::alibi, alibi.has_value());
    add(Feature::lse, wants_lse);
    add(Feature::gqa, nheads_q != nheads_kv);
    add(Feature::mask, mask.has_value());
    add(Feature::sinks, sinks.has_value());
    add(Feature::block_mask, block_mask.has_value());
    add(Feature::score_program, score_program.has_value());
    add(Feature::varlen, sequences.given);
    add(Feature::paged_kv, page_size > 0);
    add(Feature::attention_chunk, visible.chunk > 0);
    add(Feature::append, append.has_value());
    add(Feature::rotary, rotary.has_value());
    add(Feature::dropout, dropout.has_value());
    add(Feature::quantised,
        quantised_query.has_value() || quantised_key.has_value() || quantised_value.has_value());
    return set;
}

}  // namespace umfa
