// The Metal text of one kernel.
#pragma once

#include <string>

#include "core/export.h"
#include "metal/launch_plan.h"

namespace umfa::metal {

/// "#define NAME VALUE" lines for the macros of a launch, to stand in front of its shader.
///
/// MTLCompileOptions.preprocessorMacros would not do: Apple's compiler service takes its options as
/// one string, divided at spaces, and these values have quotes, commas and spaces.
UMFA_CORE_API std::string kernel_defines(const KernelLaunch& launch);

/// What Metal compiles for a launch: the defines, then the shader, whose own #line directives keep
/// the lines of messages right. Empty where the build has no such shader.
UMFA_CORE_API std::string kernel_text(const KernelLaunch& launch);

}  // namespace umfa::metal
