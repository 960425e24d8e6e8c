// Which instruction set's kernels run: the best one this CPU has, or the one UMFA_CPU_ISA names.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/export.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {

/// Kernels in use. Throws `Error` when UMFA_CPU_ISA names a set that cannot run here.
const Kernels& kernels();

UMFA_CORE_API std::string isa_in_use();
/// Every set compiled into this build, best first, and whether this CPU can run it.
UMFA_CORE_API std::vector<std::pair<std::string, bool>> isa_list();
/// Forces a set for the whole process; "auto" undoes it. Throws `Error` like kernels().
UMFA_CORE_API void set_isa(const std::string& name);

}  // namespace umfa::cpu
