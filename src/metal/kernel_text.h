// The Metal text of one kernel. Its constants reach it as function constants, which our own executor
// sets, or as text.
#pragma once

#include <string>

#include "core/instruments.h"

namespace umfa::metal {

/// What Metal compiles for a launch: the defines, then the shader, whose own #line directives keep
/// the lines of messages right. Empty where the build has no such shader.
UMFA_CORE_API std::string kernel_text(const KernelLaunch& launch);

}  // namespace umfa::metal
