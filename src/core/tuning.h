// Choices of a backend that measurements on this machine may change. Each value gives right results.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace umfa {

struct Tuning {
    /// "auto" leaves calls on host memory with fewer FLOP to the CPU. Committing a command buffer and
    /// waiting for it costs a fraction of a millisecond, in which the CPU kernels do about this much.
    /// The default is an estimate: it has not been measured on Apple hardware.
    double worthwhile_flop = 2e7;
    /// Threadgroups among which each GPU core's share of the keys of few queries is split. Three of
    /// 128 threads, at about 120 registers a lane, fill an Apple core's 208 KB of registers. A fourth
    /// would only wait for one of them (H100, 16k keys, 32/8 heads: 44 us with four for each of its
    /// multiprocessors, which hold three as well). Changes the bits of results.
    int64_t decode_threadgroups_per_core = 3;
    /// Names of kernels with other tiles than the default. Changes the bits of results.
    std::vector<std::string> tiles;
};

/// Where the values come from.
struct Tuned {
    Tuning values;
    std::string when, device, system;   // of the record in use; empty: the defaults
    std::vector<std::string> measured;  // what the values follow from
    std::string kept;     // the record's file; empty: there is none, or it is not used
    std::string ignored;  // why a record is not used, or was not kept
    /// Kernels that `tiles` may choose among on this GPU: lists, each with the default first.
    std::vector<std::vector<std::string>> tile_choices;
};

}  // namespace umfa
