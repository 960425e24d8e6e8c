#include "cpu/backward_shared.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <thread>

#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

constexpr int64_t all_steps = std::numeric_limits<int64_t>::max();

int64_t divided_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
int64_t rounded_up(int64_t x, int64_t step) { return divided_up(x, step) * step; }

/// Waits until more than `step` steps are done. A step takes microseconds, unless the system has stopped
/// the thread that does it.
void wait_for(const std::atomic<int64_t>& done, int64_t step) {
    constexpr int looks = 200;
    for (int i = 0; done.load(std::memory_order_acquire) <= step; ++i)
        if (i >= looks) std::this_thread::yield();
}

}  // namespace

SharedTasks::SharedTasks(const BackwardArgs& args, const BackwardKernel& kernel,
                         const BackwardTask& common, const Heads& heads, int threads)
    : args_(args),
      kernel_(kernel),
      common_(common),
      heads_(heads),
      sizes_(kernel.sizes(args)),
      blocks_(divided_up(common.key_end, sizes_.key_block)),
      sums_heads_(common.dmask.stride_head == 0) {
    for (int64_t b = 0; b < heads.batch; ++b)
        for (int64_t head = 0; head < heads.query; ++head) all_heads_.push_back({b, head});
    set_places(threads);
    tasks_ = std::make_unique<Task[]>(static_cast<size_t>(heads.batch * heads.kv * blocks_));
    const int64_t batches = common.dmask.stride_batch ? 1 : heads.batch;
    const int64_t kv_heads = sums_heads_ ? heads.kv : 1;
    for (int64_t b = 0; b < heads.batch; b += batches)
        for (int64_t head = 0; head < heads.kv; head += kv_heads) {
            std::vector<SequenceHead> first_heads;
            for (int64_t i = b; i < b + batches; ++i)
                for (int64_t j = head; j < head + kv_heads; ++j)
                    first_heads.push_back({i, j * args.group});
            add_heads_that_share(first_heads);
        }
    estimate();
}

/// Sums of how many blocks of keys are kept at a time.
///
/// Heads that share a mask follow each other through a block, at a distance of a tile of queries. But a
/// task of several heads that are summed can only begin when the one before it is at its last head: then
/// as many blocks as there are threads are computed side by side.
void SharedTasks::set_places(int threads) {
    const int64_t batches = common_.dmask.stride_batch ? 1 : heads_.batch;
    const int64_t sharing = batches * (sums_heads_ ? heads_.kv : 1);
    const bool several = sums_heads_ && args_.group > 1;
    // In all at most four times the floats of dQ, or two blocks: whatever the lengths, not all pairs.
    const int64_t own = sizes_.key_block * (sums_heads_ ? 1 : args_.group);
    const int64_t most =
        std::max<int64_t>(4 * heads_.batch * heads_.query * sizes_.dquery_pitch / own, 2);
    if (several) side_by_side_ = std::min({blocks_, int64_t{threads}, most});
    // A place is used again by a task that begins when the last one to use it is probably done.
    const int64_t ahead = std::max<int64_t>(threads - side_by_side_, 0);
    const int64_t rounds = heads_.batch * heads_.kv / sharing * divided_up(blocks_, side_by_side_);
    const int64_t kept = std::min({rounds, 1 + divided_up(ahead, sharing * side_by_side_),
                                   std::max<int64_t>(most / side_by_side_, 1)});
    last_in_place_.assign(static_cast<size_t>(kept * side_by_side_), nullptr);
    at_once_ = static_cast<int>(
        std::min<int64_t>(kept * side_by_side_ * (several ? 1 : sharing), threads));
}

void SharedTasks::add_heads_that_share(const std::vector<SequenceHead>& first_heads) {
    std::vector<const Task*> last_of_heads(first_heads.size(), nullptr);
    for (int64_t from = 0; from < blocks_; from += side_by_side_) {
        const int64_t to = std::min(from + side_by_side_, blocks_);
        std::vector<const Task*> last_of_keys(static_cast<size_t>(to - from), nullptr);
        for (size_t i = 0; i < first_heads.size(); ++i)
            for (int64_t block = from; block < to; ++block) {
                Task& task = add(first_heads[i], block);
                const Task*& before = last_of_keys[static_cast<size_t>(block - from)];
                task.place = next_place_ + static_cast<size_t>(block - from);
                task.same_heads = last_of_heads[i];
                task.same_keys = before;
                if (!before) task.same_place = last_in_place_[task.place];
                task.sums.first_keys = block == 0;
                task.sums.last_keys = block + 1 == blocks_;
                task.sums.first_heads = i == 0;
                task.sums.last_heads = i + 1 == first_heads.size();
                last_of_heads[i] = before = &task;
            }
        for (size_t i = 0; i < last_of_keys.size(); ++i)
            last_in_place_[next_place_ + i] = last_of_keys[i];
        next_place_ = (next_place_ + static_cast<size_t>(side_by_side_)) % last_in_place_.size();
    }
}

SharedTasks::Task& SharedTasks::add(const SequenceHead& first_head, int64_t block) {
    Task& task = tasks_[static_cast<size_t>(count_++)];
    BackwardTask& work = task.work;
    const int64_t head = first_head.sequence * heads_.query + first_head.head;
    work = common_;
    work.heads = all_heads_.data() + head;
    work.head_count = args_.group;
    work.key_begin = block * sizes_.key_block;
    work.key_end = std::min(work.key_begin + sizes_.key_block, common_.key_end);
    if (work.dslopes) work.dslopes += head * work.dslopes_pitch;
    work.shared = &task.sums;
    task.tiles = divided_up(common_.query_end, sizes_.query_tile);
    task.sums.context = &task;
    task.sums.wait = wait;
    task.sums.finish = finish;
    return task;
}

/// Each task goes to the thread that is free first.
void SharedTasks::estimate() {
    // What taking a turn costs, in pairs: many are nothing else where sequences are short.
    constexpr double turn = 100;
    std::priority_queue<double, std::vector<double>, std::greater<>> ends(
        std::greater<>(), std::vector<double>(static_cast<size_t>(at_once_), 0.0));
    const double steps =
        static_cast<double>(args_.group * divided_up(common_.query_end, sizes_.query_tile));
    double most = 0;
    for (int64_t i = 0; i < count_; ++i) {
        const BackwardTask& work = tasks_[static_cast<size_t>(i)].work;
        const Sequence& sequence = args_.sequences[work.heads->sequence];
        const int64_t keys = std::min(work.key_end, sequence.seqlen_kv) - work.key_begin;
        const double own = static_cast<double>(work.head_count * sequence.seqlen_q) *
                           static_cast<double>(std::max<int64_t>(keys, 0));
        const double end = ends.top() + own + steps * turn;
        ends.pop();
        ends.push(end);
        pairs_ += own;
        most = std::max(most, own);
        longest_ = std::max(longest_, end);
    }
    // Each thread begins a tile after the one before it.
    longest_ += most / steps * (at_once_ - 1);
}

void SharedTasks::place_sums() {
    constexpr int64_t line = 16;  // floats
    const auto allocate = [](std::unique_ptr<float[]>& own, int64_t floats) {
        own.reset(new float[static_cast<size_t>(floats + line)]);
        void* at = own.get();
        size_t size = static_cast<size_t>(floats + line) * sizeof(float);
        return static_cast<float*>(std::align(line * sizeof(float), line, at, size));
    };
    std::vector<int64_t> first(1, 0);  // float of each head
    for (const SequenceHead& one : all_heads_)
        first.push_back(first.back() +
                        sizes_.dquery_pitch *
                            rounded_up(args_.sequences[one.sequence].seqlen_q, sizes_.query_tile));
    float* dquery = common_.dquery ? allocate(dquery_, first.back()) : nullptr;
    const int64_t rows = rounded_up(common_.query_end, sizes_.query_tile);
    const int64_t of_head = rows * sizes_.key_block;
    const int64_t of_place = of_head * (sums_heads_ ? 1 : args_.group);
    float* dmask = allocate(dmask_, of_place * static_cast<int64_t>(last_in_place_.size()));
    for (int64_t i = 0; i < count_; ++i) {
        Task& task = tasks_[static_cast<size_t>(i)];
        if (dquery)
            task.sums.dquery =
                dquery + first[static_cast<size_t>(task.work.heads - all_heads_.data())];
        task.sums.dmask = dmask + of_place * static_cast<int64_t>(task.place);
        task.sums.dmask_head = sums_heads_ ? 0 : of_head;
    }
}

void SharedTasks::wait(void* context, int64_t step) {
    const Task& task = *static_cast<const Task*>(context);
    if (task.same_place) wait_for(task.same_place->done, all_steps - 1);
    if (task.same_heads) wait_for(task.same_heads->done, step);
    if (!task.same_keys) return;
    // Of heads that are summed, all of the task before come first.
    const bool sums_heads = task.sums.dmask_head == 0;
    wait_for(task.same_keys->done,
             sums_heads ? (task.work.head_count - 1) * task.tiles + step % task.tiles : step);
}

void SharedTasks::finish(void* context, int64_t step) {
    static_cast<Task*>(context)->done.store(step + 1, std::memory_order_release);
}

void SharedTasks::run(int threads) {
    place_sums();
    parallel_for(count_, threads, [&](int64_t i) {
        Task& task = tasks_[static_cast<size_t>(i)];
        // Also where it throws: others wait for it.
        const struct AtEnd {
            std::atomic<int64_t>& done;
            ~AtEnd() { done.store(all_steps, std::memory_order_release); }
        } at_end{task.done};
        kernel_.run(args_, task.work, thread_scratch(kernel_.scratch_floats(args_, task.work)));
    });
}

}  // namespace umfa::cpu
