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
        if (request_.new_key) refuse(names_[Field::new_key]);
        if (request_.rotary_cos || request_.rotary_sin) refuse(names_[Field::rotary_cos]);
        if (request_.return_attn_probs && request_.dropout_p != 0)
            refuse(names_[Field::return_attn_probs]);
    }

    void check_table(const TensorView& table, Field field, int ndim, int64_t rows) const {
        const std::string& name = names_[field];
        if (table.dtype != DType::i32 && table.dtype != DType::i64)
            check_.type(name + " has the wrong dtype", name_of(table.dtype), "int32 or int64");
        check_same_device(check_, table, name, *request_.query);
        if (table.ndim != ndim || (rows >= 0 && table.shape[0] != rows))
            check_.value(name + " has the wrong shape", shape_text(table),
                         std::to_string(ndim) + " dimensions" +
                             (rows < 0 ? "" : ", the first of " + std::to_string(rows)));
        check_memory(check_, table, name);
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
        if (request_.rotary_seqlens) refuse(names_[Field::rotary_seqlens]);
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
