// Backward tasks that share the gradient of a mask: see SharedSums.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/isa/kernels.h"

namespace umfa::cpu {

/// One task for each block of keys of each key head. It computes all gradients, the mask's too, with five
/// products. Tasks whose heads share elements of the mask take turns at them.
///
/// Tasks are begun in their order, and wait only for earlier ones. So one of them can always go on,
/// whatever the number of threads.
class SharedTasks {
public:
    struct Heads {
        int64_t batch, query, kv;
    };
    /// `common`: what the tasks have in common. It has the queries and keys of the mask, whose gradient has
    /// rows and columns.
    SharedTasks(const BackwardArgs& args, const BackwardKernel& kernel, const BackwardTask& common,
                const Heads& heads, int threads);

    /// Pairs of query and key, and those of the longest thread.
    double pairs() const { return pairs_; }
    double longest() const { return longest_; }
    void run(int threads);

private:
    struct Task {
        BackwardTask work;
        SharedSums sums;
        int64_t tiles;  // of queries, of a head
        size_t place;   // of the sums of the mask's gradient
        // What it waits for: the task of the heads before it with the same keys, that of the keys before
        // them with the same heads, and the last one that has used its place. Null: none.
        const Task *same_keys, *same_heads, *same_place;
        std::atomic<int64_t> done;  // steps
    };

    void set_places(int threads);
    void add_heads_that_share(const std::vector<SequenceHead>& first_heads);
    Task& add(const SequenceHead& first_head, int64_t block);
    void estimate();
    void place_sums();
    static void wait(void* context, int64_t step);
    static void finish(void* context, int64_t step);

    const BackwardArgs& args_;
    const BackwardKernel& kernel_;
    const BackwardTask common_;
    const Heads heads_;
    const BackwardSizes sizes_;
    const int64_t blocks_;      // of keys
    const bool sums_heads_;     // that share a key head
    int64_t side_by_side_ = 1;  // blocks of keys
    int at_once_ = 1;           // threads that find a task
    std::vector<SequenceHead> all_heads_;
    std::unique_ptr<Task[]> tasks_;
    int64_t count_ = 0;
    std::vector<const Task*> last_in_place_;
    size_t next_place_ = 0;
    std::unique_ptr<float[]> dquery_, dmask_;
    double pairs_ = 0, longest_ = 0;
};

}  // namespace umfa::cpu
