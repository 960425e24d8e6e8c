// Which instruction set's kernels run: the best one this CPU has, or the one UMFA_CPU_ISA names.
#pragma once

#include "core/instruments.h"
#include "cpu/isa/kernels.h"

namespace umfa::cpu {

/// Kernels in use. Throws `Error` when UMFA_CPU_ISA names a set that cannot run here.
const Kernels& kernels();

}  // namespace umfa::cpu
