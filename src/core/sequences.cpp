#include "core/sequences.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace umfa {
namespace {

class Reader {
public:
    explicit Reader(std::string_view function) : function_(function) {}

    [[noreturn]] void refuse(const std::string& what, const std::string& got,
                             const std::string& expected) const {
        fail(ErrorKind::value, function_, what, got, expected);
    }

    /// A table of integers of the given shape (-1: any size).
    void check(const TensorView& table, const std::string& name, int ndim, int64_t rows,
               const std::string& expected) const {
        if (table.dtype != DType::i32 && table.dtype != DType::i64)
            fail(ErrorKind::type, function_, name + " has the wrong dtype", name_of(table.dtype),
                 "int32 or int64");
        if (table.device != Device::cpu)
            refuse(name + " is on another device", device_text(table), "cpu");
        if (table.ndim != ndim || (rows >= 0 && table.shape[0] != rows))
            refuse(name + " has the wrong shape", shape_text(table), expected);
        if (table.size() != 0 && table.data == nullptr)
            refuse(name + " has no memory", "a null pointer", "the tensor's data");
    }

    static int64_t element(const TensorView& table, int64_t row, int64_t column = 0) {
        const int64_t at =
            row * table.strides[0] + (table.ndim > 1 ? column * table.strides[1] : 0);
        if (table.dtype == DType::i32) {
            int32_t value;
            std::memcpy(&value, table.address() + at * 4, 4);
            return value;
        }
        int64_t value;
        std::memcpy(&value, table.address() + at * 8, 8);
        return value;
    }

    /// One number for each sequence, each within [low, high(b)].
    template <class High>
    void read(const TensorView& table, const std::string& name, int64_t batch, int64_t low,
              High&& high, const std::string& limit, std::vector<int64_t>& values) const {
        check(table, name, 1, batch, "(" + std::to_string(batch) + ",)");
        values.resize(static_cast<size_t>(batch));
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t value = element(table, b);
            if (value < low || value > high(b))
                refuse(name + "[" + std::to_string(b) + "] is out of range", std::to_string(value),
                       std::to_string(low) + " to " + std::to_string(high(b)) + ", " + limit);
            values[static_cast<size_t>(b)] = value;
        }
    }

    /// Offsets of packed sequences in a tensor of `total` rows.
    void offsets(const TensorView& table, const std::string& name, int64_t total,
                 std::vector<int64_t>& values) const {
        check(table, name, 1, -1, "(batch + 1,)");
        if (table.shape[0] < 1) refuse(name + " is empty", shape_text(table), "(batch + 1,)");
        values.resize(static_cast<size_t>(table.shape[0]));
        for (int64_t i = 0; i < table.shape[0]; ++i) {
            const int64_t value = element(table, i);
            const std::string place = name + "[" + std::to_string(i) + "]";
            if (i == 0 && value != 0)
                refuse(place + " is not the start", std::to_string(value), "0");
            if (i > 0 && value < values[static_cast<size_t>(i - 1)])
                refuse(name + " is not monotone",
                       place + " = " + std::to_string(value) + " after " +
                           std::to_string(values[size_t(i - 1)]),
                       "offsets that do not decrease");
            if (value > total)
                refuse(place + " is past the end", std::to_string(value),
                       "at most " + std::to_string(total) + ", the tensor's rows");
            values[static_cast<size_t>(i)] = value;
        }
    }

private:
    std::string_view function_;
};

/// Refuses sequences that would write the same row of the cache: which one comes last would be
/// chance.
void check_apart(const Reader& read, const Sequences& found, const AttentionRequest& tables,
                 const SequenceShapes& shapes) {
    const Function& names = *tables.function;
    struct Span {
        int64_t begin, end;  // (batch index or page, row) in one number
        size_t sequence;
    };
    std::vector<Span> spans;
    for (size_t b = 0; b < found.rows.size(); ++b) {
        const SequenceRows& rows = found.rows[b];
        int64_t first = rows.kv_row + rows.seqlen_kv - shapes.appended;
        if (!tables.block_table) {
            first += rows.kv_batch * shapes.kv_rows;
            spans.push_back({first, first + shapes.appended, b});
            continue;
        }
        for (const int64_t end = first + shapes.appended; first < end;) {
            const int64_t page = first / shapes.kv_rows, row = first % shapes.kv_rows;
            const int64_t count = std::min(end - first, shapes.kv_rows - row);
            const int64_t at =
                found.pages[b * static_cast<size_t>(found.pages_per_sequence) + size_t(page)] *
                    shapes.kv_rows +
                row;
            spans.push_back({at, at + count, b});
            first += count;
        }
    }
    std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) {
        return x.begin != y.begin ? x.begin < y.begin : x.sequence < y.sequence;
    });
    for (size_t i = 1; i < spans.size(); ++i)
        if (spans[i].begin < spans[i - 1].end)
            read.refuse("sequences " + std::to_string(spans[i - 1].sequence) + " and " +
                            std::to_string(spans[i].sequence) + " would write the same row of " +
                            names[Field::key],
                        "row " + std::to_string(spans[i].begin % shapes.kv_rows) + " of " +
                            (tables.block_table ? "page " : "index ") +
                            std::to_string(spans[i].begin / shapes.kv_rows),
                        "a place of its own for each new row");
}

}  // namespace

Sequences read_sequences(const AttentionRequest& tables, const SequenceShapes& shapes) {
    const Function& names = *tables.function;
    const Reader read{names.name};
    Sequences found;
    found.given = true;
    std::vector<int64_t> q_offsets, k_offsets, used_q, used_k, index, leftpad, prefix;
    int64_t batch = shapes.query_batch;
    if (tables.cu_seqlens_q) {
        read.offsets(*tables.cu_seqlens_q, names[Field::cu_seqlens_q], shapes.query_rows,
                     q_offsets);
        batch = static_cast<int64_t>(q_offsets.size()) - 1;
    }
    const auto q_rows = [&](int64_t b) {
        const size_t i = static_cast<size_t>(b);
        return tables.cu_seqlens_q ? q_offsets[i + 1] - q_offsets[i] : shapes.query_rows;
    };

    // Keys: how many rows there are for a sequence, before seqused_k cuts them down.
    if (tables.cu_seqlens_k) {
        read.check(*tables.cu_seqlens_k, names[Field::cu_seqlens_k], 1, batch + 1,
                   "(" + std::to_string(batch + 1) + ",), as " + names[Field::cu_seqlens_q]);
        read.offsets(*tables.cu_seqlens_k, names[Field::cu_seqlens_k],
                     tables.block_table ? INT32_MAX : shapes.kv_rows, k_offsets);
    }
    int64_t paged_rows = 0;
    if (tables.block_table) {
        read.check(*tables.block_table, names[Field::block_table], 2, batch,
                   "(" + std::to_string(batch) + ", pages of a sequence)");
        if (tables.cache_batch_idx)
            read.refuse(names[Field::cache_batch_idx] + " and " + names[Field::block_table] +
                            " exclude each other",
                        "both", "one of them: a block table already says where a sequence lies");
        if (__builtin_mul_overflow(tables.block_table->shape[1], shapes.kv_rows, &paged_rows))
            paged_rows = INT64_MAX;
    }
    const auto k_rows = [&](int64_t b) {
        const size_t i = static_cast<size_t>(b);
        if (tables.cu_seqlens_k) return k_offsets[i + 1] - k_offsets[i];
        return tables.block_table ? paged_rows : shapes.kv_rows;
    };
    const std::string& name = names[Field::seqused_k];
    if (tables.seqused_q)
        read.read(*tables.seqused_q, names[Field::seqused_q], batch, 0, q_rows,
                  "the sequence's rows", used_q);
    if (tables.seqused_k)
        read.read(*tables.seqused_k, name, batch, 0, k_rows, "the sequence's rows", used_k);
    if (tables.cache_batch_idx)
        read.read(
            *tables.cache_batch_idx, names[Field::cache_batch_idx], batch, 0,
            [&](int64_t) { return shapes.kv_batch - 1; }, "the cache's batch", index);
    else if (!tables.cu_seqlens_k && !tables.block_table && shapes.kv_batch != batch)
        read.refuse("batch differs: the query has " + std::to_string(batch) + ", " +
                        names[Field::key] + " has " + std::to_string(shapes.kv_batch),
                    std::to_string(shapes.kv_batch),
                    std::to_string(batch) + ", or cache_batch_idx");
    const auto end_of = [&](int64_t b) {
        return (tables.seqused_k ? used_k[static_cast<size_t>(b)] : k_rows(b)) + shapes.appended;
    };
    for (int64_t b = 0; shapes.appended > 0 && b < batch; ++b)
        if (end_of(b) > k_rows(b))
            read.refuse(names[Field::key] + " overflows for sequence " + std::to_string(b),
                        std::to_string(end_of(b) - shapes.appended) + " rows in use and " +
                            std::to_string(shapes.appended) + " new ones",
                        "at most " + std::to_string(k_rows(b)) + " in all");
    if (tables.cache_leftpad) {
        if (tables.block_table)
            read.refuse(names[Field::cache_leftpad] + " and " + names[Field::block_table] +
                            " exclude each other",
                        "both", "one of them");
        read.read(*tables.cache_leftpad, names[Field::cache_leftpad], batch, 0, end_of,
                  "the keys in use", leftpad);
    }

    if (tables.prefix_lens)
        read.read(
            *tables.prefix_lens, names[Field::prefix_lens], batch, 0,
            [](int64_t) { return int64_t{INT32_MAX}; }, "a number of keys", prefix);

    for (int64_t b = 0; b < batch; ++b) {
        const size_t i = static_cast<size_t>(b);
        SequenceRows rows;
        rows.query_batch = tables.cu_seqlens_q ? 0 : b;
        rows.query_row = tables.cu_seqlens_q ? q_offsets[i] : 0;
        rows.seqlen_q = tables.seqused_q ? used_q[i] : q_rows(b);
        if (tables.cu_seqlens_k && !tables.block_table)
            rows.kv_row = k_offsets[i];
        else if (!tables.block_table)
            rows.kv_batch = tables.cache_batch_idx ? index[i] : b;
        const int64_t skipped = tables.cache_leftpad ? leftpad[i] : 0;
        rows.kv_row += skipped;
        rows.seqlen_kv = end_of(b) - skipped;
        if (tables.prefix_lens) rows.prefix = std::min(prefix[i], rows.seqlen_kv);
        rows.position_q = end_of(b) - shapes.appended;
        found.rows.push_back(rows);
    }

    if (tables.block_table) {
        if (shapes.kv_rows < 1)
            read.refuse(names[Field::key] + " has pages without rows",
                        "page size " + std::to_string(shapes.kv_rows), "at least 1");
        // What lies past a sequence's last page is never read, and may hold anything.
        const auto pages_of = [&](const SequenceRows& rows) {
            return rows.seqlen_kv / shapes.kv_rows + (rows.seqlen_kv % shapes.kv_rows != 0);
        };
        for (const SequenceRows& rows : found.rows) {
            if (rows.seqlen_kv > INT32_MAX)
                read.refuse("a sequence of " + names[Field::key] + " is too long",
                            std::to_string(rows.seqlen_kv), "at most " + std::to_string(INT32_MAX));
            found.pages_per_sequence = std::max(found.pages_per_sequence, pages_of(rows));
        }
        found.pages.resize(static_cast<size_t>(batch * found.pages_per_sequence));
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t rows = found.rows[static_cast<size_t>(b)].seqlen_kv;
            const int64_t used = pages_of(found.rows[static_cast<size_t>(b)]);
            if (used > tables.block_table->shape[1])
                read.refuse(names[Field::block_table] + " has too few pages for sequence " +
                                std::to_string(b),
                            std::to_string(tables.block_table->shape[1]) + " pages of " +
                                std::to_string(shapes.kv_rows) + " rows",
                            "pages for " + std::to_string(rows) + " rows");
            for (int64_t p = 0; p < used; ++p) {
                const int64_t page = Reader::element(*tables.block_table, b, p);
                if (page < 0 || page >= shapes.kv_batch)
                    read.refuse(names[Field::block_table] + "[" + std::to_string(b) + "][" +
                                    std::to_string(p) + "] is no page of the cache",
                                std::to_string(page),
                                "0 to " + std::to_string(shapes.kv_batch - 1));
                found.pages[static_cast<size_t>(b * found.pages_per_sequence + p)] =
                    static_cast<int32_t>(page);
            }
        }
    }

    if (shapes.appended > 0) check_apart(read, found, tables, shapes);

    const auto promise = [&](const std::optional<int64_t>& most, const std::string& side,
                             auto&& length) {
        if (!most) return;
        for (const SequenceRows& rows : found.rows)
            if (length(rows) > *most)
                read.refuse(side + " is too small", std::to_string(*most),
                            "at least " + std::to_string(length(rows)) +
                                ", the length of sequence " +
                                std::to_string(&rows - found.rows.data()));
    };
    promise(tables.max_seqlen_q, names[Field::max_seqlen_q],
            [](const SequenceRows& r) { return r.seqlen_q; });
    promise(tables.max_seqlen_k, names[Field::max_seqlen_k],
            [](const SequenceRows& r) { return r.seqlen_kv; });
    return found;
}

}  // namespace umfa
