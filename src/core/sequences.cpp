#include "core/sequences.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/sequence_bounds.h"

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

    /// One number for each sequence, each within [low, high(b)].
    template <class High>
    void read(const TensorView& table, const std::string& name, int64_t batch, int64_t low,
              High&& high, const std::string& limit, std::vector<int64_t>& values) const {
        check(table, name, 1, batch, "(" + std::to_string(batch) + ",)");
        values.resize(static_cast<size_t>(batch));
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t value = integer_at(table, b);
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
            const int64_t value = integer_at(table, i);
            const std::string place = name + "[" + std::to_string(i) + "]";
            if (i == 0 && value < 0)
                refuse(place + " is negative", std::to_string(value), "0 or more");
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
        int64_t first = rows.kv_row + rows.seqlen_kv - rows.new_rows;
        if (rows.new_rows == 0) continue;
        if (!tables.block_table) {
            first += rows.kv_batch * shapes.kv_rows;
            spans.push_back({first, first + rows.new_rows, b});
            continue;
        }
        for (const int64_t end = first + rows.new_rows; first < end;) {
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

/// The steps of read_sequences(), in their order.
class SequenceReader {
public:
    SequenceReader(const AttentionRequest& tables, const SequenceShapes& shapes)
        : tables_(tables), shapes_(shapes), names_(*tables.function), read_(names_.name) {}

    Sequences make() {
        found_.given = true;
        read_queries();
        read_new_rows();
        read_keys();
        read_cache_indices();
        read_starts();
        for (int64_t b = 0; b < batch_; ++b) found_.rows.push_back(rows_of(b));
        if (tables_.block_table) read_pages();
        check_apart(read_, found_, tables_, shapes_);
        check_promises();
        return std::move(found_);
    }

private:
    using Numbers = std::vector<int64_t>;  // one for each sequence

    int64_t q_rows(int64_t b) const {
        const size_t i = static_cast<size_t>(b);
        return tables_.cu_seqlens_q ? q_offsets_[i + 1] - q_offsets_[i] : shapes_.query_rows;
    }
    int64_t new_rows(int64_t b) const {
        const size_t i = static_cast<size_t>(b);
        return tables_.cu_seqlens_k_new ? new_offsets_[i + 1] - new_offsets_[i] : shapes_.new_rows;
    }
    /// How many rows there are for a sequence, before seqused_k cuts them down.
    int64_t k_rows(int64_t b) const {
        const size_t i = static_cast<size_t>(b);
        if (tables_.cu_seqlens_k) return k_offsets_[i + 1] - k_offsets_[i];
        return tables_.block_table ? paged_rows_ : shapes_.kv_rows;
    }
    int64_t in_use(int64_t b) const {
        return tables_.seqused_k ? used_k_[static_cast<size_t>(b)] : k_rows(b);
    }
    int64_t end_of(int64_t b) const { return in_use(b) + new_rows(b); }

    /// Offsets of as many packed sequences as there are.
    void read_offsets(const TensorView& table, Field field, int64_t total, Numbers& values) const {
        read_.check(table, names_[field], 1, batch_ + 1,
                    "(" + std::to_string(batch_ + 1) + ",)" +
                        (tables_.cu_seqlens_q ? ", as " + names_[Field::cu_seqlens_q] : ""));
        read_.offsets(table, names_[field], total, values);
    }

    void read_queries() {
        batch_ = shapes_.query_batch;
        if (tables_.cu_seqlens_q) {
            read_.offsets(*tables_.cu_seqlens_q, names_[Field::cu_seqlens_q], shapes_.query_rows,
                          q_offsets_);
            batch_ = static_cast<int64_t>(q_offsets_.size()) - 1;
        }
        if (tables_.seqused_q)
            read_.read(
                *tables_.seqused_q, names_[Field::seqused_q], batch_, 0,
                [&](int64_t b) { return q_rows(b); }, "the sequence's rows", used_q_);
    }

    void read_new_rows() {
        if (tables_.cu_seqlens_k_new) {
            const std::string& name = names_[Field::cu_seqlens_k_new];
            if (!tables_.new_key)
                read_.refuse(name + " is for new keys", "no " + names_[Field::new_key],
                             names_[Field::new_key] + " and " + names_[Field::new_value]);
            read_offsets(*tables_.cu_seqlens_k_new, Field::cu_seqlens_k_new, shapes_.new_rows,
                         new_offsets_);
        } else if (tables_.new_key && shapes_.new_batch != batch_) {
            read_.refuse(
                names_[Field::new_key] + " has the wrong shape", shape_text(*tables_.new_key),
                "a batch of " + std::to_string(batch_) + ", as " + names_[Field::cu_seqlens_q]);
        }
    }

    void read_keys() {
        if (tables_.cu_seqlens_k)
            read_offsets(*tables_.cu_seqlens_k, Field::cu_seqlens_k,
                         tables_.block_table ? INT32_MAX : shapes_.kv_rows, k_offsets_);
        if (tables_.block_table) {
            const bool chosen = tables_.cache_batch_idx.has_value();
            read_.check(
                *tables_.block_table, names_[Field::block_table], 2, chosen ? -1 : batch_,
                "(" + (chosen ? "batch" : std::to_string(batch_)) + ", pages of a sequence)");
            constexpr int64_t most = INT64_MAX / 2;  // leaves room for new rows
            if (__builtin_mul_overflow(tables_.block_table->shape[1], shapes_.kv_rows,
                                       &paged_rows_))
                paged_rows_ = most;
            paged_rows_ = std::min(paged_rows_, most);
        }
        if (tables_.seqused_k)
            read_.read(
                *tables_.seqused_k, names_[Field::seqused_k], batch_, 0,
                [&](int64_t b) { return k_rows(b); }, "the sequence's rows", used_k_);
    }

    /// Which index of the cache, or row of the block table, belongs to which query.
    void read_cache_indices() {
        const bool packed = tables_.cu_seqlens_k && !tables_.block_table;
        if (tables_.cache_batch_idx) {
            const std::string& name = names_[Field::cache_batch_idx];
            if (packed)
                read_.refuse(name + " and " + names_[Field::cu_seqlens_k] + " exclude each other",
                             "both", "one of them: packed keys have no batch");
            const int64_t batch =
                tables_.block_table ? tables_.block_table->shape[0] : shapes_.kv_batch;
            read_.read(
                *tables_.cache_batch_idx, name, batch_, 0, [&](int64_t) { return batch - 1; },
                tables_.block_table ? "a row of " + names_[Field::block_table]
                                    : "the cache's batch",
                index_);
        } else if (!packed && !tables_.block_table && shapes_.kv_batch != batch_) {
            read_.refuse("batch differs: the query has " + std::to_string(batch_) + ", " +
                             names_[Field::key] + " has " + std::to_string(shapes_.kv_batch),
                         std::to_string(shapes_.kv_batch),
                         std::to_string(batch_) + ", or cache_batch_idx");
        }
    }

    /// Room for the new rows, and where keys and angles begin; keys that all queries see.
    void read_starts() {
        for (int64_t b = 0; b < batch_; ++b)
            if (new_rows(b) > 0 && end_of(b) > k_rows(b))
                read_.refuse(names_[Field::key] + " overflows for sequence " + std::to_string(b),
                             std::to_string(in_use(b)) + " rows in use and " +
                                 std::to_string(new_rows(b)) + " new ones",
                             "at most " + std::to_string(k_rows(b)) + " in all");
        if (tables_.cache_leftpad)
            read_.read(
                *tables_.cache_leftpad, names_[Field::cache_leftpad], batch_, 0,
                [&](int64_t b) { return end_of(b); }, "the keys in use", leftpad_);
        if (tables_.rotary_seqlens)
            read_.read(
                *tables_.rotary_seqlens, names_[Field::rotary_seqlens], batch_, 0,
                [](int64_t) { return INT32_MAX; }, "a position", positions_);
        if (tables_.prefix_lens)
            read_.read(
                *tables_.prefix_lens, names_[Field::prefix_lens], batch_, 0,
                [](int64_t) { return INT32_MAX; }, "a number of keys", prefix_);
    }

    SequenceRows rows_of(int64_t b) const {
        const size_t i = static_cast<size_t>(b);
        SequenceRows rows;
        rows.query_batch = tables_.cu_seqlens_q ? 0 : b;
        rows.query_row = tables_.cu_seqlens_q ? q_offsets_[i] : 0;
        rows.seqlen_q = tables_.seqused_q ? used_q_[i] : q_rows(b);
        if (tables_.cu_seqlens_k && !tables_.block_table)
            rows.kv_row = k_offsets_[i];
        else if (!tables_.block_table)
            rows.kv_batch = tables_.cache_batch_idx ? index_[i] : b;
        const int64_t skipped = tables_.cache_leftpad ? leftpad_[i] : 0;
        rows.kv_row += skipped;
        rows.seqlen_kv = end_of(b) - skipped;
        if (tables_.prefix_lens) rows.prefix = std::min(prefix_[i], rows.seqlen_kv);
        rows.position_q = tables_.rotary_seqlens ? positions_[i] : in_use(b);
        rows.new_batch = tables_.cu_seqlens_k_new ? 0 : b;
        rows.new_row = tables_.cu_seqlens_k_new ? new_offsets_[i] : 0;
        rows.new_rows = new_rows(b);
        return rows;
    }

    /// What the table says of rows before the first that counts or is written, and of those past the
    /// end, is never read, and may be anything.
    void read_pages() {
        const int64_t size = shapes_.kv_rows;
        if (size < 1)
            read_.refuse(names_[Field::key] + " has pages without rows",
                         "page size " + std::to_string(size), "at least 1");
        const auto pages_of = [&](const SequenceRows& rows) {
            const int64_t end = rows.kv_row + rows.seqlen_kv;
            return end / size + (end % size != 0);
        };
        for (const SequenceRows& rows : found_.rows) {
            if (rows.kv_row + rows.seqlen_kv > INT32_MAX)
                read_.refuse("a sequence of " + names_[Field::key] + " is too long",
                             std::to_string(rows.kv_row + rows.seqlen_kv),
                             "at most " + std::to_string(INT32_MAX));
            found_.pages_per_sequence = std::max(found_.pages_per_sequence, pages_of(rows));
        }
        found_.pages.resize(static_cast<size_t>(batch_ * found_.pages_per_sequence));
        for (int64_t b = 0; b < batch_; ++b) {
            const SequenceRows& rows = found_.rows[static_cast<size_t>(b)];
            const int64_t used = pages_of(rows);
            // Padding may reach into the new rows.
            const int64_t first =
                rows.kv_row + std::min(int64_t{0}, rows.seqlen_kv - rows.new_rows);
            if (used > tables_.block_table->shape[1])
                read_.refuse(names_[Field::block_table] + " has too few pages for sequence " +
                                 std::to_string(b),
                             std::to_string(tables_.block_table->shape[1]) + " pages of " +
                                 std::to_string(size) + " rows",
                             "pages for " + std::to_string(rows.kv_row + rows.seqlen_kv) + " rows");
            for (int64_t p = first / size; p < used; ++p)
                found_.pages[static_cast<size_t>(b * found_.pages_per_sequence + p)] = page(b, p);
        }
    }

    int32_t page(int64_t b, int64_t p) const {
        const int64_t row = tables_.cache_batch_idx ? index_[static_cast<size_t>(b)] : b;
        const int64_t found = integer_at(*tables_.block_table, row, p);
        if (found < 0 || found >= shapes_.kv_batch)
            read_.refuse(names_[Field::block_table] + "[" + std::to_string(row) + "][" +
                             std::to_string(p) + "] is no page of the cache",
                         std::to_string(found), "0 to " + std::to_string(shapes_.kv_batch - 1));
        return static_cast<int32_t>(found);
    }

    void check_promises() const {
        const auto check = [&](const std::optional<int64_t>& most, const std::string& side,
                               auto&& length) {
            if (!most) return;
            for (const SequenceRows& rows : found_.rows)
                if (length(rows) > *most)
                    read_.refuse(side + " is too small", std::to_string(*most),
                                 "at least " + std::to_string(length(rows)) +
                                     ", the length of sequence " +
                                     std::to_string(&rows - found_.rows.data()));
        };
        check(tables_.max_seqlen_q, names_[Field::max_seqlen_q],
              [](const SequenceRows& r) { return r.seqlen_q; });
        check(tables_.max_seqlen_k, names_[Field::max_seqlen_k],
              [](const SequenceRows& r) { return r.seqlen_kv; });
    }

    const AttentionRequest& tables_;
    const SequenceShapes& shapes_;
    const Function& names_;
    const Reader read_;
    Sequences found_;
    int64_t batch_ = 0, paged_rows_ = 0;
    Numbers q_offsets_, k_offsets_, new_offsets_, used_q_, used_k_, index_, leftpad_, positions_,
        prefix_;
};

}  // namespace

int64_t integer_at(const TensorView& table, int64_t row, int64_t column) {
    const int64_t at = row * table.strides[0] + (table.ndim > 1 ? column * table.strides[1] : 0);
    if (table.dtype == DType::i32) {
        int32_t value;
        std::memcpy(&value, table.address() + at * 4, 4);
        return value;
    }
    int64_t value;
    std::memcpy(&value, table.address() + at * 8, 8);
    return value;
}

Sequences read_sequences(const AttentionRequest& request, const SequenceShapes& shapes) {
    return request.tables_in_stream ? sequence_bounds(request, shapes)
                                    : SequenceReader(request, shapes).make();
}

}  // namespace umfa
