// What the CPU can do and how many of them we may use.
#pragma once

#include <string>
#include <vector>

#include "core/export.h"

namespace umfa::cpu {

/// Names of the instruction set extensions that this CPU and OS offer, of those umfa cares about.
UMFA_CORE_API const std::vector<std::string>& features();
bool has_feature(const char* name);

/// CPUs this process may run on: the affinity mask on Linux, performance cores on macOS.
int usable_cpus();

}  // namespace umfa::cpu
