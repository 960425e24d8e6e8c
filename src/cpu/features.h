// Instruction set extensions of the CPU, and how many CPUs the process may use.
#pragma once

#include "core/instruments.h"

namespace umfa::cpu {

bool has_feature(const char* name);

/// CPUs this process may run on: the affinity mask on Linux, performance cores on macOS.
int usable_cpus();

}  // namespace umfa::cpu
