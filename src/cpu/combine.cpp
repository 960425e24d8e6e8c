#include "cpu/combine.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/float_environment.h"
#include "cpu/isa/select.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

/// One row of the result.
struct Row {
    int64_t batch, row, head;

    int64_t offset(const CombineOperand& operand) const {
        return batch * operand.stride_batch + row * operand.stride_row + head * operand.stride_head;
    }
};

char* element(const CombineOperand& operand, int64_t offset) {
    return operand.view.address() + offset * (bits_of(operand.view.dtype) / 8);
}

constexpr int64_t lanes = 16;  // of the widest vector

/// Merges one row. Parts are weighed by exp(lse - merged lse), so no division follows, and one part
/// alone keeps its bits.
void merge_row(const CombineProblem& problem, const CombineResults& results,
               const CombineKernel& from, const CombineKernel& to, const Row& row, float* sum,
               float* weights) {
    const auto* lse = reinterpret_cast<const float*>(
        element(problem.lse_partial, row.offset(problem.lse_partial)));
    const auto lse_of = [&](int64_t part) { return lse[part * problem.lse_partial.stride_part]; };
    float maximum = -infinity;
    for (int64_t part = 0; part < problem.parts; ++part) maximum = std::max(maximum, lse_of(part));
    double total = 0;  // NaN if a part has NaN or +inf
    for (int64_t part = 0; part < problem.parts; ++part) {
        if (lse_of(part) == -infinity) continue;
        const double weight = std::exp(static_cast<double>(lse_of(part)) - maximum);
        weights[part] = static_cast<float>(weight);
        total += weight;
    }
    std::fill_n(sum, problem.head_dim, 0.f);
    const int64_t first = row.offset(problem.out_partial);
    for (int64_t part = 0; part < problem.parts; ++part) {
        if (lse_of(part) == -infinity) continue;  // it saw no key: its result does not count
        from.add(element(problem.out_partial, first + part * problem.out_partial.stride_part),
                 problem.out_partial.stride_channel, problem.head_dim,
                 static_cast<float>(weights[part] / total), sum);
    }
    to.store(sum, problem.head_dim, element(results.out, row.offset(results.out)),
             results.out.stride_channel);
    *reinterpret_cast<float*>(element(results.lse, row.offset(results.lse))) =
        total == 0 ? -infinity : static_cast<float>(maximum + std::log(total));
}

}  // namespace

void run_combine(const CombineProblem& problem, const CombineResults& results) {
    const int64_t rows = problem.batch * problem.seqlen_q * problem.nheads;
    if (rows == 0) return;
    const DefaultFloatEnvironment environment;
    const Kernels& set = kernels();
    const CombineKernel& from = kernels_for(set, problem.out_partial.view.dtype).combine;
    const CombineKernel& to = kernels_for(set, problem.out_dtype).combine;
    const int64_t room = problem.head_dim + lanes;
    constexpr int64_t together = 16;  // rows of a task
    const double floats = static_cast<double>(rows) * static_cast<double>(problem.parts) *
                          static_cast<double>(problem.head_dim + 8);
    parallel_for((rows + together - 1) / together, threads_worth(floats), [&](int64_t task) {
        float* sum = thread_scratch(room + problem.parts);
        std::fill_n(sum, room, 0.f);
        const int64_t end = std::min(rows, (task + 1) * together);
        for (int64_t i = task * together; i < end; ++i) {
            const int64_t position = i / problem.nheads;
            merge_row(
                problem, results, from, to,
                {position / problem.seqlen_q, position % problem.seqlen_q, i % problem.nheads}, sum,
                sum + room);
        }
    });
}

}  // namespace umfa::cpu
