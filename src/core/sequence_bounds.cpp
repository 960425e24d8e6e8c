#include "core/sequence_bounds.h"

#include <algorithm>
#include <string>

#include "core/checks.h"

namespace umfa {
namespace {

class Bounds {
public:
    Bounds(const AttentionRequest& request, const SequenceShapes& shapes)
        : request_(request), shapes_(shapes), names_(*request.function), check_{names_.name} {}

    Sequences make() {
        refuse_what_needs_numbers();
        read_batch();
        check_tables();
        check_promise();
        check_cache();
        check_append();
        Sequences found;
        found.given = true;
        found.rows.assign(static_cast<size_t>(batch_), longest());
        for (int64_t b = 0; b < batch_; ++b) {
            SequenceRows& rows = found.rows[static_cast<size_t>(b)];
            rows.query_batch = request_.cu_seqlens_q ? 0 : b;
        }
        if (request_.block_table) found.pages_per_sequence = request_.block_table->shape[1];
        found.tables = tables();
        return found;
    }

private:
    [[noreturn]] void refuse(const std::string& what) const {
        check_.unsupported(what + " needs numbers that lie on the GPU", "a table on the GPU",
                           "tables that the host can read");
    }

    void refuse_what_needs_numbers() const {
        const bool rotates = request_.rotary_cos || request_.rotary_sin;
        if (rotates && !request_.new_key) refuse(names_[Field::rotary_cos]);
        if (request_.new_key && (request_.cu_seqlens_k || request_.max_seqlen_k))
            refuse(names_[Field::new_key]);
        if (request_.return_attn_probs && request_.dropout_p != 0)
            refuse(names_[Field::return_attn_probs]);
    }

    void check_table(const TensorView& table, Field field, int ndim, int64_t rows) const {
        const std::string& name = names_[field];
        if (table.dtype != DType::i32 && table.dtype != DType::i64)
            check_.type(name + " has the wrong dtype", name_of(table.dtype), "int32 or int64");
        if (table.device != Device::cpu) check_same_device(check_, table, name, *request_.query);
        if (table.ndim != ndim || (rows >= 0 && table.shape[0] != rows))
            check_.value(name + " has the wrong shape", shape_text(table),
                         std::to_string(ndim) + " dimensions" +
                             (rows < 0 ? "" : ", the first of " + std::to_string(rows)));
        check_memory(check_, table, name);
        if (on_host(table)) check_numbers(table, field);
    }

    /// Whether the host can read a table, beside others that it cannot.
    bool on_host(const TensorView& table) const {
        return table.device == Device::cpu && request_.query->device != Device::cpu;
    }

    /// What the host can see is refused now, not when the call has run: the waiting path says how.
    void check_numbers(const TensorView& table, Field field) const {
        const bool is_offset = field == Field::cu_seqlens_q || field == Field::cu_seqlens_k;
        int64_t low = 0, high = INT32_MAX;
        if (field == Field::cu_seqlens_q) high = shapes_.query_rows;
        if (field == Field::cu_seqlens_k && !request_.block_table) high = shapes_.kv_rows;
        if (field == Field::seqused_q) high = shapes_.query_rows;
        if (field == Field::seqused_k) high = key_rows() - shapes_.new_rows;
        if (field == Field::cache_leftpad) high = key_rows();
        if (field == Field::cache_batch_idx)
            high = (request_.block_table ? request_.block_table->shape[0] : shapes_.kv_batch) - 1;
        if (field == Field::block_table) return;  // entries that are not in use may be anything
        for (int64_t i = 0; i < table.shape[0]; ++i) {
            const int64_t value = integer_at(table, i);
            if (value < low || value > high)
                check_.value(names_[field] + "[" + std::to_string(i) + "] is out of range",
                             std::to_string(value),
                             std::to_string(low) + " to " + std::to_string(high));
            if (is_offset) low = value;
        }
    }

    void read_batch() {
        batch_ = shapes_.query_batch;
        if (!request_.cu_seqlens_q) return;
        check_table(*request_.cu_seqlens_q, Field::cu_seqlens_q, 1, -1);
        batch_ = request_.cu_seqlens_q->shape[0] - 1;
        if (batch_ < 0)
            check_.value(names_[Field::cu_seqlens_q] + " is empty", "no entry", "(batch + 1,)");
    }

    void check_tables() const {
        const struct {
            const std::optional<TensorView>& table;
            Field field;
            int64_t rows;
        } lengths[] = {{request_.cu_seqlens_k, Field::cu_seqlens_k, batch_ + 1},
                       {request_.seqused_q, Field::seqused_q, batch_},
                       {request_.seqused_k, Field::seqused_k, batch_},
                       {request_.cache_batch_idx, Field::cache_batch_idx, batch_},
                       {request_.cache_leftpad, Field::cache_leftpad, batch_},
                       {request_.prefix_lens, Field::prefix_lens, batch_}};
        for (const auto& [table, field, rows] : lengths)
            if (table) check_table(*table, field, 1, rows);
        if (request_.block_table)
            check_table(*request_.block_table, Field::block_table, 2,
                        request_.cache_batch_idx ? -1 : batch_);
        if (request_.cu_seqlens_k_new) refuse(names_[Field::cu_seqlens_k_new]);
        if (request_.rotary_seqlens)
            check_table(*request_.rotary_seqlens, Field::rotary_seqlens, 1, batch_);
    }

    /// Room for the new rows, and whether a kernel can tell that no two sequences write the same.
    void check_append() const {
        if (!request_.new_key) return;
        if (shapes_.new_batch != batch_)
            check_.value(names_[Field::new_key] + " has the wrong shape",
                         shape_text(*request_.new_key), "a batch of " + std::to_string(batch_));
        if (shapes_.new_rows > key_rows() || (shapes_.new_rows > 0 && !request_.seqused_k))
            check_.value(names_[Field::key] + " overflows", std::to_string(shapes_.new_rows),
                         "at most " + std::to_string(key_rows()));
        constexpr int64_t most_pieces = 1024;  // each is compared with each
        if (checks_shared() && batch_ * new_pieces() > most_pieces)
            refuse(names_[Field::new_key] + " of so many pages");
    }

    bool checks_shared() const { return request_.block_table || request_.cache_batch_idx; }

    int64_t new_pieces() const {
        if (!request_.block_table) return 1;
        return (shapes_.new_rows + shapes_.kv_rows - 2) / shapes_.kv_rows + 1;
    }

    /// What the host knows without a table.
    void check_promise() const {
        const bool known = !request_.cu_seqlens_q && !request_.seqused_q;
        if (known && shapes_.query_rows > most(request_.max_seqlen_q))
            check_.value(names_[Field::max_seqlen_q] + " is too small",
                         std::to_string(*request_.max_seqlen_q),
                         "at least " + std::to_string(shapes_.query_rows));
    }

    void check_cache() const {
        const bool packed = request_.cu_seqlens_k && !request_.block_table;
        if (packed && request_.cache_batch_idx)
            check_.value(names_[Field::cache_batch_idx] + " and " + names_[Field::cu_seqlens_k] +
                             " exclude each other",
                         "both", "one of them");
        if (!packed && !request_.block_table && !request_.cache_batch_idx &&
            shapes_.kv_batch != batch_)
            check_.value("batch differs", std::to_string(shapes_.kv_batch),
                         std::to_string(batch_) + ", or " + names_[Field::cache_batch_idx]);
        if (request_.block_table && request_.block_table->size() > INT32_MAX)
            check_.unsupported(names_[Field::block_table] + " is too large",
                               shape_text(*request_.block_table), "less than 2^31 entries");
        // An index is clamped into what is there, so that something has to be.
        if ((request_.block_table || request_.cache_batch_idx) &&
            (shapes_.kv_batch < 1 || shapes_.kv_rows < 1 ||
             (request_.block_table &&
              (request_.block_table->shape[0] < 1 || request_.block_table->shape[1] < 1))))
            check_.value(names_[Field::key] + " has no rows", "an empty cache", "at least one row");
    }

    int64_t key_rows() const {
        if (!request_.block_table) return shapes_.kv_rows;
        int64_t rows = 0;
        if (__builtin_mul_overflow(request_.block_table->shape[1], shapes_.kv_rows, &rows))
            return INT32_MAX;
        return std::min<int64_t>(rows, INT32_MAX);
    }

    SequenceRows longest() const {
        SequenceRows rows;
        rows.seqlen_q = std::min(shapes_.query_rows, most(request_.max_seqlen_q));
        rows.seqlen_kv = std::min(key_rows(), most(request_.max_seqlen_k));
        if (request_.prefix_lens) rows.prefix = rows.seqlen_kv;
        rows.new_rows = shapes_.new_rows;
        return rows;
    }

    /// A promise, which the kernel checks.
    static int64_t most(const std::optional<int64_t>& promised) {
        return std::clamp<int64_t>(promised.value_or(INT32_MAX), 0, INT32_MAX);
    }

    DeviceTables tables() const {
        DeviceTables found;
        size_t i = 0;
#define UMFA_TABLE(name, text) found.views[i++] = request_.name;
#include "core/options.def"
        found.query_rows = shapes_.query_rows;
        found.kv_batch = shapes_.kv_batch;
        found.key_rows = key_rows();
        found.new_rows = shapes_.new_rows;
        found.new_pieces = request_.new_key ? new_pieces() : 0;
        found.checks_shared = checks_shared();
        found.most_q = most(request_.max_seqlen_q);
        found.most_kv = most(request_.max_seqlen_k);
        return found;
    }

    const AttentionRequest& request_;
    const SequenceShapes& shapes_;
    const Function& names_;
    const Checker check_;
    int64_t batch_ = 0;
};

}  // namespace

Sequences sequence_bounds(const AttentionRequest& request, const SequenceShapes& shapes) {
    return Bounds(request, shapes).make();
}

}  // namespace umfa
