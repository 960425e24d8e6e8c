// Where the sequences of a call lie: packed one after the other (varlen), in a cache, in pages, or
// simply one per index of the batch. Read and checked once, on the host.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/export.h"
#include "core/request.h"

namespace umfa {

/// Rows are counted in the tensors as Problem holds them: (batch, head, position, channel).
struct SequenceRows {
    int64_t query_batch = 0, query_row = 0;  // its first query
    int64_t kv_batch = 0, kv_row = 0;  // its first key; with pages kv_row is a row of all of them
    int64_t seqlen_q = 0, seqlen_kv = 0;
    int64_t position_q = 0;              // of its first query and new key, for rotary angles
    int64_t prefix = 0;                  // keys that all its queries see
    int64_t new_batch = 0, new_row = 0;  // its first new key
    int64_t new_rows = 0;                // how many; they are the last of its seqlen_kv
};

/// The shapes that the tables speak about, in rows and batch indices.
struct SequenceShapes {
    int64_t query_batch = 0, query_rows = 0;  // of a dense query; of a packed one 1 and its total
    int64_t kv_batch = 0, kv_rows = 0;        // with pages: number of pages, and rows of a page
    int64_t new_batch = 0, new_rows = 0;      // of dense new keys; of packed ones 1 and their total
};

/// Tables that the host does not read. A kernel does when it runs, and clamps what it finds.
struct DeviceTables {
    std::array<std::optional<TensorView>, table_count> views;  // in the order of options.def
    int64_t query_rows = 0;           // of a dense query; of a packed one its total
    int64_t kv_batch = 0;             // or pages
    int64_t key_rows = 0;             // likewise of the keys; with pages, of all of a sequence's
    int64_t new_rows = 0;             // of each sequence
    int64_t new_pieces = 0;           // pages, or 1, that they reach into, at most
    bool checks_shared = false;       // sequences may have places in common
    int64_t most_q = 0, most_kv = 0;  // max_seqlen_q and max_seqlen_k
    void* fault = nullptr;            // where the kernel notes what was out of range, if known
};

struct Sequences {
    bool given = false;              // there are tables; else everything is in its place
    std::vector<SequenceRows> rows;  // one for each index of the batch
    std::vector<int32_t> pages;      // (batch, pages_per_sequence), only with a block table
    int64_t pages_per_sequence = 0;
    std::optional<DeviceTables> tables;  // `rows` are then the longest possible, and no pages known
};

/// An entry of a table of int32 or int64 in host memory.
int64_t integer_at(const TensorView& table, int64_t row, int64_t column = 0);

/// Reads and checks everything; throws `Error` with the offending value and its place.
UMFA_CORE_API Sequences read_sequences(const AttentionRequest& request,
                                       const SequenceShapes& shapes);

}  // namespace umfa
