// The shaders that the build put into the library; nothing is looked for on disk at run time.
// Written by shaders/embed.py.
#pragma once

#include <string_view>

#include "core/export.h"

namespace umfa::metal {

/// Text of a file of shaders/ with its own headers put in, ready for newLibraryWithSource; empty for
/// an unknown name.
UMFA_CORE_API std::string_view shader_text(std::string_view file);

/// The metallib of all shaders; empty where the build had no compiler of Apple's.
UMFA_CORE_API std::string_view metallib();

}  // namespace umfa::metal
