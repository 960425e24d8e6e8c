// Instruction set extensions of the CPU, and how many CPUs the process may use.
#pragma once

#include <string>
#include <vector>

#include "core/export.h"

namespace umfa::cpu {

/// Names of those instruction set extensions that umfa looks for and that this CPU and OS offer.
UMFA_CORE_API const std::vector<std::string>& features();
bool has_feature(const char* name);

/// CPUs this process may run on: the affinity mask on Linux, performance cores on macOS.
int usable_cpus();

}  // namespace umfa::cpu
