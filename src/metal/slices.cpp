#include "metal/slices.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "core/error.h"

namespace umfa::metal {
namespace {

/// What a core does in a second, for each GPU family from Apple7 on. FLOP: half of the peak, which is
/// 256 FLOP a cycle at 1.28 GHz (M1), 1.40 (M2), 1.38 (M3, M4 from 1.5 on) and about 1.6 (M5).
/// Attention reaches 70 to 85 % of the peak on M1 and less with dropout, rotary angles, masks or large
/// head dims. Bytes: half of the memory bandwidth for each core of the chip that has least: 68 GB/s
/// for 8 cores (M1), 100 for 10 (M2, M3), 153 for 10 (M5). Estimates from published numbers, not
/// measured: a slice may take a third or three times as long.
constexpr struct {
    double flop, bytes;
} rates[] = {{164e9, 4.2e9}, {179e9, 5e9}, {177e9, 5e9}, {205e9, 7.6e9}};

/// macOS's watchdog ends command buffers after seconds. A quarter of one leaves room for the estimate
/// to be wrong, and for the passes that NaN among the values asks for (values.h). Longer than this the
/// display would stand still; a command buffer costs about 0.1 ms, which is 0.04 % of it.
constexpr double usual_slice_seconds = 0.25;

/// Threadgroups that a core holds at once: a slice of whole rounds of them leaves no core idle in its
/// last one.
constexpr double threadgroups_per_core = 3;

/// Of the counts up to `most`, down to half of it, the largest of those with which `count` * `unit`
/// threadgroups leave the fewest places in the last round empty.
int64_t best_count(int64_t most, int64_t unit, double round) {
    const auto idle = [&](int64_t count) {
        const double rounds = static_cast<double>(count) * static_cast<double>(unit) / round;
        return std::ceil(rounds) / rounds;
    };
    // Within one round more counts would repeat what the last ones have shown.
    const int64_t least =
        std::max<int64_t>({1, (most + 1) / 2, most - static_cast<int64_t>(round)});
    int64_t best = most;
    for (int64_t count = most - 1; count >= least; --count)
        if (idle(count) < idle(best) - 1e-9) best = count;
    return best;
}

/// Cuts the first axis, whose indices take different times, into runs.
std::vector<GridSlice> runs_of(uint32_t length, double limit, double round, double cores,
                               const std::function<double(uint32_t)>& seconds) {
    std::vector<GridSlice> runs;
    for (uint32_t first = 0; first < length;) {
        double sum = seconds(first) / cores;
        uint32_t end = first + 1;
        for (double next; end < length; ++end, sum += next) {
            next = seconds(end) / cores;
            if (sum + next > limit) break;
        }
        if (end < length) {
            const auto kept = static_cast<uint32_t>(best_count(end - first, 1, round));
            for (; end > first + kept; --end) sum -= seconds(end - 1) / cores;
        }
        runs.push_back({{first, 0, 0}, {end - first, 1, 1}, sum});
        first = end;
    }
    return runs;
}

}  // namespace

double core_seconds(const Cost& cost, const Capabilities& gpu) {
    const auto& rate = rates[static_cast<int>(gpu.family) - static_cast<int>(Family::apple7)];
    return std::max(cost.flop / rate.flop, cost.bytes / rate.bytes);
}

double slice_seconds() {
    const char* text = std::getenv("UMFA_METAL_SLICE_MS");
    if (!text || !*text) return usual_slice_seconds;
    char* end = nullptr;
    const double milliseconds = std::strtod(text, &end);
    if (*end || !(milliseconds > 0) || !std::isfinite(milliseconds))
        fail(ErrorKind::value, "umfa", "UMFA_METAL_SLICE_MS is wrong",
             "'" + std::string(text) + "'", "a positive number of milliseconds");
    return milliseconds / 1000;
}

std::vector<GridSlice> slices_of(const Size3& grid, double most, const Capabilities& gpu,
                                 const std::function<double(uint32_t)>& seconds) {
    const double limit = slice_seconds(), cores = gpu.cores, round = cores * threadgroups_per_core;
    const double rest = static_cast<double>(grid.y) * grid.z;  // threadgroups with the same x
    const double at_most = most / cores * grid.x * rest;
    if (at_most <= limit) return {{{0, 0, 0}, grid, at_most}};
    double line = 0;
    for (uint32_t x = 0; x < grid.x; ++x) line += seconds(x) / cores;
    if (line * rest <= limit) return {{{0, 0, 0}, grid, line * rest}};

    // Whole lines or planes where some fit, so that slices are few.
    std::vector<GridSlice> pieces = {{{0, 0, 0}, {grid.x, 1, 1}, line}};
    uint32_t y_step = 1, z_step = 1;
    if (line > limit) {
        pieces = runs_of(grid.x, limit, round, cores, seconds);
    } else if (const double plane = line * grid.y; plane > limit) {
        y_step =
            static_cast<uint32_t>(best_count(static_cast<int64_t>(limit / line), grid.x, round));
    } else {
        y_step = grid.y;
        z_step = static_cast<uint32_t>(
            best_count(static_cast<int64_t>(limit / plane), int64_t{grid.x} * grid.y, round));
    }
    std::vector<GridSlice> slices;
    for (uint32_t z = 0; z < grid.z; z += z_step)
        for (uint32_t y = 0; y < grid.y; y += y_step)
            for (const GridSlice& piece : pieces) {
                const uint32_t ys = std::min(y_step, grid.y - y), zs = std::min(z_step, grid.z - z);
                slices.push_back(
                    {{piece.origin.x, y, z}, {piece.size.x, ys, zs}, piece.seconds * ys * zs});
            }
    return slices;
}

size_t launches_together(const LaunchPlan& plan, size_t first) {
    const double limit = slice_seconds();
    double sum = plan.launches[first].seconds;
    size_t last = first + 1;
    while (last < plan.launches.size() && sum + plan.launches[last].seconds <= limit)
        sum += plan.launches[last++].seconds;
    return last - first;
}

}  // namespace umfa::metal
