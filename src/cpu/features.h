// Instruction set extensions of the CPU, and how many CPUs the process may use.
#pragma once

#include "core/instruments.h"

namespace umfa::cpu {

bool has_feature(const char* name);

/// Asks the system for the registers of AMX, once for the process: 0, or the errno of its refusal. Every
/// thread may use them from then on, and so may children after fork().
int request_tiles();

/// Whether AVX-512 multiplies bfloat16 faster than float32, measured once. Only where it has both.
bool bf16_products_pay();

/// CPUs this process may run on: the affinity mask on Linux, performance cores on macOS.
int usable_cpus();

}  // namespace umfa::cpu
