// Where sequences lie, from tables that only the GPU reads: lengths, offsets and pages. The kernels that
// attend find here what the host writes where it can read the tables itself.
//
// Nobody has checked the numbers. Each is clamped into what the tensors hold, so that no kernel leaves
// them, and the first that was not there is kept for the host.
#include <metal_stdlib>

#include "shared/indices.h"
#include "shared/params.h"
#include "shared/visible.h"

using namespace metal;

using namespace umfa;

namespace umfa {

/// The tables, by their buffers.
struct Tables {
    device const uchar* at[UMFA_SEQUENCES_TABLES];
};

inline bool has_table(constant SequencesParams& params, int table) {
    return params.tables[table].kind != UMFA_TABLE_NONE;
}

inline int64_t number_at(thread const Tables& tables, constant SequencesParams& params, int table,
                         int row, int column) {
    constant TableLayout& layout = params.tables[table];
    const int64_t at = row * layout.row + column * layout.column;
    if (layout.kind == UMFA_TABLE_I32)
        return reinterpret_cast<device const int*>(tables.at[table])[at];
    return reinterpret_cast<device const int64_t*>(tables.at[table])[at];
}

/// The number in [low, high], or what of that is nearest. A thread keeps its first fault.
inline int64_t clamped(int64_t got, int64_t low, int64_t high, thread TableFault& fault, int table,
                       int row, int column) {
    high = max(low, high);
    if (got >= low && got <= high) return got;
    if (fault.table == 0) {
        fault.got = got;
        fault.low = low;
        fault.high = high;
        fault.table = table + 1;
        fault.row = row;
        fault.column = column;
    }
    return got < low ? low : high;
}

/// Number `row` of a table, clamped.
inline int64_t number_in(thread const Tables& tables, constant SequencesParams& params, int table,
                         int row, int64_t low, int64_t high, thread TableFault& fault) {
    return clamped(number_at(tables, params, table, row, 0), low, high, fault, table, row, 0);
}

/// Whether the offset behind sequence `b` goes back.
inline bool goes_back(thread const Tables& tables, constant SequencesParams& params, int b) {
    return has_table(params, UMFA_SEQUENCES_CU_SEQLENS_Q) &&
           number_at(tables, params, UMFA_SEQUENCES_CU_SEQLENS_Q, b + 1, 0) <
               number_at(tables, params, UMFA_SEQUENCES_CU_SEQLENS_Q, b, 0);
}

/// The place of sequence `b`, as the host's read_sequences() has it. From sequence `end` on none has
/// queries: they would lie where others do.
inline SequenceParams place_of(thread const Tables& tables, constant SequencesParams& params, int b,
                               int end, thread TableFault& fault) {
    const bool paged = has_table(params, UMFA_SEQUENCES_BLOCK_TABLE);
    SequenceParams place = {};
    int64_t seqlen_q = params.query_rows;
    if (has_table(params, UMFA_SEQUENCES_CU_SEQLENS_Q)) {
        const int64_t first =
            number_in(tables, params, UMFA_SEQUENCES_CU_SEQLENS_Q, b, 0, params.query_rows, fault);
        // Of rows that are not all in use, only those that are count.
        const bool all = !has_table(params, UMFA_SEQUENCES_SEQUSED_Q);
        const int64_t most =
            all ? min(params.query_rows, first + params.most_q) : params.query_rows;
        place.query_row = first;
        seqlen_q =
            number_in(tables, params, UMFA_SEQUENCES_CU_SEQLENS_Q, b + 1, first, most, fault) -
            first;
    } else {
        place.query_batch = b;
    }
    if (has_table(params, UMFA_SEQUENCES_SEQUSED_Q))
        seqlen_q = number_in(tables, params, UMFA_SEQUENCES_SEQUSED_Q, b, 0,
                             min(seqlen_q, params.most_q), fault);

    int64_t rows = params.key_rows;
    if (has_table(params, UMFA_SEQUENCES_CU_SEQLENS_K)) {
        // Beside pages only the lengths count.
        const int64_t total = paged ? int64_t(UMFA_UNBOUNDED) : params.key_rows;
        const int64_t first =
            number_in(tables, params, UMFA_SEQUENCES_CU_SEQLENS_K, b, 0, total, fault);
        rows = number_in(tables, params, UMFA_SEQUENCES_CU_SEQLENS_K, b + 1, first,
                         min(total, first + params.key_rows), fault) -
               first;
        if (!paged) place.kv_row = first;
    }
    if (has_table(params, UMFA_SEQUENCES_SEQUSED_K))
        rows = number_in(tables, params, UMFA_SEQUENCES_SEQUSED_K, b, 0, rows - params.new_rows,
                         fault);
    int64_t position = rows;
    rows += params.new_rows;
    if (has_table(params, UMFA_SEQUENCES_CACHE_BATCH_IDX))
        place.kv_batch = number_in(tables, params, UMFA_SEQUENCES_CACHE_BATCH_IDX, b, 0,
                                   (paged ? params.table_rows : params.kv_batch) - 1, fault);
    else if (paged || !has_table(params, UMFA_SEQUENCES_CU_SEQLENS_K))
        place.kv_batch = b;
    if (has_table(params, UMFA_SEQUENCES_CACHE_LEFTPAD)) {
        const int64_t skipped =
            number_in(tables, params, UMFA_SEQUENCES_CACHE_LEFTPAD, b, 0, rows, fault);
        place.kv_row += skipped;
        rows -= skipped;
    }
    rows = clamped(rows, 0, params.most_kv, fault, UMFA_FAULT_LENGTH - 1, b, 0);
    if (b >= end) seqlen_q = 0;
    place.seqlen_q = int(seqlen_q);
    place.visibility.seqlen_kv = int(rows);
    place.visibility.offset = params.top_left != 0 ? 0 : int(rows - seqlen_q);
    place.visibility.left = params.visibility.left;
    place.visibility.right = params.visibility.right;
    place.visibility.chunk = params.visibility.chunk;
    place.visibility.chunk_offset = params.visibility.chunk_offset;
    if (has_table(params, UMFA_SEQUENCES_PREFIX_LENS))
        place.visibility.prefix =
            int(min(rows, number_in(tables, params, UMFA_SEQUENCES_PREFIX_LENS, b, 0,
                                    int64_t(UMFA_UNBOUNDED), fault)));
    if (has_table(params, UMFA_SEQUENCES_ROTARY_SEQLENS))
        position = number_in(tables, params, UMFA_SEQUENCES_ROTARY_SEQLENS, b, 0,
                             int64_t(UMFA_UNBOUNDED), fault);
    place.position_q =
        params.new_rows == 0
            ? place.visibility.offset
            : int(clamped(position, 0, params.last_position, fault, UMFA_FAULT_POSITION - 1, b, 0));
    place.splits = 1;
    return place;
}

/// Page `index` of all sequences, if it is in use. Others are never read.
inline void take_page(thread const Tables& tables, constant SequencesParams& params,
                      device int* pages, device const SequenceParams* places, int index,
                      thread TableFault& fault) {
    const int b = index / params.pages, page = index % params.pages;
    // Padding may reach into the new rows.
    const int64_t begin =
        places[b].kv_row + min(0, places[b].visibility.seqlen_kv - params.new_rows);
    if (page < begin / params.page_size) return;
    if (int64_t(page) * params.page_size >= places[b].kv_row + places[b].visibility.seqlen_kv)
        return;
    const int row = int(places[b].kv_batch);  // of the table
    pages[index] = int(clamped(number_at(tables, params, UMFA_SEQUENCES_BLOCK_TABLE, row, page), 0,
                               params.kv_batch - 1, fault, UMFA_SEQUENCES_BLOCK_TABLE, row, page));
}

/// Rows that a sequence appends in one piece: in its index of the cache, or in a page.
struct Piece {
    int64_t index;
    int first, end;
};

inline Piece piece_of(constant SequencesParams& params, device const SequenceParams* places,
                      device const int* pages, int b, int piece) {
    const int end = int(places[b].kv_row) + places[b].visibility.seqlen_kv;
    const int first = end - params.new_rows;
    Piece found = {places[b].kv_batch, first, end};
    if (params.page_size > 0) {
        const int page = first / params.page_size + piece, at = page * params.page_size;
        found.first = max(first - at, 0);
        found.end = min(end - at, params.page_size);
        found.index = found.first < found.end ? pages[places[b].pages + page] : -1;
    }
    return found;
}

/// Whether sequence `b` appends rows that an earlier sequence appends, or that it appends twice itself:
/// which one comes last would be chance.
inline bool shares_rows(constant SequencesParams& params, device const SequenceParams* places,
                        device const int* pages, int b, thread TableFault& fault) {
    const int pieces = params.new_pieces;
    for (int i = 0; i < pieces; ++i) {
        const Piece own = piece_of(params, places, pages, b, i);
        if (own.index < 0) continue;
        for (int before = 0; before < b * pieces + i; ++before) {
            const int other = before / pieces;
            const Piece theirs = piece_of(params, places, pages, other, before % pieces);
            if (theirs.index != own.index || theirs.first >= own.end || own.first >= theirs.end)
                continue;
            clamped(other, b + 1, b + 1, fault, UMFA_FAULT_SHARED - 1, b, 0);  // never equal
            return true;
        }
    }
    return false;
}

/// What threadgroups append. Where rows would be written twice, the later sequence writes none.
inline void list_appends(constant SequencesParams& params, device const SequenceParams* places,
                         device const int* pages, device AppendTask* appends, int b,
                         thread TableFault& fault) {
    const bool shares = params.check_shared != 0 && shares_rows(params, places, pages, b, fault);
    const int count = (params.new_rows - 1) / params.append_block + 1;
    for (int i = 0; i < count; ++i) {
        const int row = i * params.append_block;
        const int rows = shares ? 0 : min(params.append_block, params.new_rows - row);
        const AppendTask task = {b,    row,
                                 b,    places[b].visibility.seqlen_kv - params.new_rows + row,
                                 rows, places[b].position_q + row};
        appends[b * count + i] = task;
    }
}

/// The keys that any query of a sequence sees: the first and how many.
inline int2 keys_seen(constant SequencesParams& params, thread const SequenceParams& place) {
    if (place.seqlen_q == 0) return int2(0, 0);
    const int first = span_begin(place.visibility, 0) / params.alignment * params.alignment;
    return int2(first, max(0, span_end(place.visibility, place.seqlen_q - 1) - first));
}

inline int blocks_of(constant SequencesParams& params, thread const SequenceParams& place) {
    const int rows = params.group * place.seqlen_q;
    return rows == 0 ? 0 : (rows - 1) / params.block + 1;
}

/// Sums of the values of all threads up to each one, in `sums`.
template <int THREADS, typename Int>
UMFA_INLINE void sum_up(threadgroup Int* sums, Int value, int thread_index) {
    Int sum = value;
    sums[thread_index] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int step = 1; step < THREADS; step *= 2) {
        if (thread_index >= step) sum += sums[thread_index - step];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sums[thread_index] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

/// The largest value of all threads.
template <int THREADS>
UMFA_INLINE int largest(threadgroup int* values, int value, int thread_index) {
    values[thread_index] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int step = THREADS / 2; step > 0; step /= 2) {
        if (thread_index < step)
            values[thread_index] = max(values[thread_index], values[thread_index + step]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int found = values[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return found;
}

/// Which of the sums is the first above `value`.
template <int THREADS>
inline int first_above(threadgroup const int* sums, int value) {
    int low = 0, high = THREADS - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (sums[middle] > value)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/// Keys of a split, as plan_decode.cpp's split_keys has them: `keys` of the longest sequence, `work` of
/// all.
inline int keys_of_split(constant SequencesParams& params, int keys, int64_t work) {
    int64_t wanted = params.splits;
    if (wanted == 0) {
        const int64_t filling =
            max(int64_t(1), int64_t(params.threadgroups) * keys / max(int64_t(1), work));
        wanted = min(max(int64_t(1), int64_t(keys / params.least_keys)), filling);
    }
    const int64_t each = (keys + wanted - 1) / wanted;
    return int(max(int64_t(1), (each + params.round - 1) / params.round) * params.round);
}

/// A place that this thread has written; behind the last an empty one.
inline SequenceParams place_at(device const SequenceParams* places, int b, int count) {
    if (b < count) {
        const SequenceParams found = places[b];
        return found;
    }
    const SequenceParams none = {};
    return none;
}

/// Fills what is left of a list.
inline void fill(device SequenceTask* tasks, int from, int end, int step) {
    const SequenceTask nothing = {-1, 0, 0, 0};
    for (int i = from; i < end; i += step) tasks[i] = nothing;
}

}  // namespace umfa

/// One threadgroup reads all tables: sums over the sequences say where a sequence's tasks begin.
template <int THREADS>
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void umfa_sequences(
    device const uchar* cu_seqlens_q [[buffer(UMFA_SEQUENCES_CU_SEQLENS_Q)]],
    device const uchar* cu_seqlens_k [[buffer(UMFA_SEQUENCES_CU_SEQLENS_K)]],
    device const uchar* seqused_q [[buffer(UMFA_SEQUENCES_SEQUSED_Q)]],
    device const uchar* seqused_k [[buffer(UMFA_SEQUENCES_SEQUSED_K)]],
    device const uchar* cache_batch_idx [[buffer(UMFA_SEQUENCES_CACHE_BATCH_IDX)]],
    device const uchar* cache_leftpad [[buffer(UMFA_SEQUENCES_CACHE_LEFTPAD)]],
    device const uchar* block_table [[buffer(UMFA_SEQUENCES_BLOCK_TABLE)]],
    device const uchar* prefix_lens [[buffer(UMFA_SEQUENCES_PREFIX_LENS)]],
    device const uchar* cu_seqlens_k_new [[buffer(UMFA_SEQUENCES_CU_SEQLENS_K_NEW)]],
    device const uchar* rotary_seqlens [[buffer(UMFA_SEQUENCES_ROTARY_SEQLENS)]],
    device SequenceParams* places [[buffer(UMFA_SEQUENCES_PLACES)]],
    device SequenceTask* tasks [[buffer(UMFA_SEQUENCES_TASKS)]],
    device SequenceTask* rows [[buffer(UMFA_SEQUENCES_ROWS)]],
    device int* pages [[buffer(UMFA_SEQUENCES_PAGES)]],
    device AppendTask* appends [[buffer(UMFA_SEQUENCES_APPENDS)]],
    device TableFault* fault_found [[buffer(UMFA_SEQUENCES_FAULT)]],
    constant SequencesParams& params [[buffer(UMFA_SEQUENCES_PARAMS)]],
    uint3 thread_position [[thread_position_in_threadgroup]]) {
    threadgroup int64_t work[THREADS];
    threadgroup int task_ends[THREADS], row_ends[THREADS], part_ends[THREADS], splits[THREADS];
    const int thread_index = thread_position.x;
    const Tables tables = {{cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_batch_idx,
                            cache_leftpad, block_table, prefix_lens, cu_seqlens_k_new,
                            rotary_seqlens}};
    // Negated, the largest is the first.
    int back = -UMFA_UNBOUNDED;
    for (int b = thread_index; b < params.batch; b += THREADS)
        if (goes_back(tables, params, b)) back = max(back, -b);
    const int end = -largest<THREADS>(task_ends, back, thread_index);
    TableFault fault = {};
    int keys = 0, faulty = -UMFA_UNBOUNDED;
    int64_t own_work = 0;
    for (int b = thread_index; b < params.batch; b += THREADS) {
        SequenceParams place = place_of(tables, params, b, end, fault);
        place.pages = int64_t(b) * params.pages;
        if (fault.table != 0) faulty = max(faulty, -b);
        const int own = keys_seen(params, place).y;
        keys = max(keys, own);
        own_work += int64_t(own) * params.heads_kv * blocks_of(params, place);
        places[b] = place;
    }
    int first_fault = -largest<THREADS>(task_ends, faulty, thread_index);
    if (has_table(params, UMFA_SEQUENCES_BLOCK_TABLE)) {
        threadgroup_barrier(mem_flags::mem_device);  // the places
        // An index that fits an int: it counts what a table has.
        faulty = -UMFA_UNBOUNDED;
        for (int i = thread_index; i < params.batch * params.pages; i += THREADS) {
            take_page(tables, params, pages, places, i, fault);
            if (fault.table != 0) faulty = max(faulty, -i);
        }
        const int first_page = -largest<THREADS>(task_ends, faulty, thread_index);
        if (first_fault == UMFA_UNBOUNDED) first_fault = first_page;
    }
    if (params.new_rows > 0) {
        threadgroup_barrier(mem_flags::mem_device);  // the places and pages
        faulty = -UMFA_UNBOUNDED;
        for (int b = thread_index; b < params.batch; b += THREADS) {
            list_appends(params, places, pages, appends, b, fault);
            if (fault.table != 0) faulty = max(faulty, -b);
        }
        const int first_shared = -largest<THREADS>(task_ends, faulty, thread_index);
        if (first_fault == UMFA_UNBOUNDED) first_fault = first_shared;
    }
    if (first_fault != UMFA_UNBOUNDED && first_fault % THREADS == thread_index &&
        fault_found->table == 0)
        *fault_found = fault;
    keys = largest<THREADS>(task_ends, keys, thread_index);
    sum_up<THREADS>(work, own_work, thread_index);
    const int each = keys_of_split(params, keys, work[THREADS - 1]);

    // In each round a thread has one sequence.
    int first_task = 0, first_row = 0;
    int64_t first_part = 0;
    for (int chunk = 0; chunk < params.batch; chunk += THREADS) {
        const int b = chunk + thread_index;
        const SequenceParams place = place_at(places, b, params.batch);
        const int seen = keys_seen(params, place).y;
        const int own_splits = max(1, seen / each + int(seen % each != 0));
        splits[thread_index] = own_splits;
        const int own_rows = params.row_count > 0 ? place.seqlen_q : 0;  // to be merged
        sum_up<THREADS>(task_ends, blocks_of(params, place) * own_splits, thread_index);
        sum_up<THREADS>(row_ends, own_rows, thread_index);
        sum_up<THREADS>(part_ends, own_rows * own_splits, thread_index);
        if (b < params.batch) {
            const int part = part_ends[thread_index] - own_rows * own_splits;
            places[b].part = (first_part + part) * params.heads;
            places[b].splits = own_splits;
        }
        const int task_end = task_ends[THREADS - 1], row_end = row_ends[THREADS - 1];
        for (int i = thread_index; i < task_end; i += THREADS) {
            const int at = first_above<THREADS>(task_ends, i);
            const int own = i - (at > 0 ? task_ends[at - 1] : 0);
            const SequenceTask task = {chunk + at, own / splits[at] * params.block,
                                       own % splits[at], each};
            tasks[first_task + i] = task;
        }
        for (int i = thread_index; i < row_end; i += THREADS) {
            const int at = first_above<THREADS>(row_ends, i);
            const SequenceTask task = {chunk + at, i - (at > 0 ? row_ends[at - 1] : 0), 0, 0};
            rows[first_row + i] = task;
        }
        first_task += task_end;
        first_row += row_end;
        first_part += part_ends[THREADS - 1];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    fill(tasks, first_task + thread_index, params.task_count, THREADS);
    fill(rows, first_row + thread_index, params.row_count, THREADS);
}

#define UMFA_SEQUENCES(NAME, ...) \
    template [[host_name(         \
        NAME)]] [[kernel]] decltype(umfa_sequences<__VA_ARGS__>) umfa_sequences<__VA_ARGS__>;

#ifdef UMFA_KERNEL
UMFA_SEQUENCES(UMFA_KERNEL, UMFA_SHAPE)
#else
UMFA_SEQUENCES("tables", 512)
#endif
