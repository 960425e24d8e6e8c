// Upper bounds of this machine: arithmetic from registers only, and reads from main memory.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/export.h"

namespace umfa::cpu {

/// (dtype, instruction set) of every loop that this CPU can run, the best of each dtype first.
UMFA_CORE_API std::vector<std::pair<std::string, std::string>> peaks();

/// Operations per second of multiply-adds (each counts two) on operands of `dtype`, over
/// num_threads() threads. `isa` may name a set of kernels: its family decides, so that "avx512"
/// finds the bfloat16 loop of "avx512_bf16"; "auto" takes the best there is.
/// Throws `Error` when this CPU has no such loop.
UMFA_CORE_API double peak(const std::string& dtype, const std::string& isa);

/// Bytes per second that num_threads() threads read from a buffer of `bytes`. The bandwidth of main
/// memory if the buffer is much larger than the caches.
UMFA_CORE_API double read_bandwidth(int64_t bytes);

}  // namespace umfa::cpu
