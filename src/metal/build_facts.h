// What stored results depend on besides the GPU: the system, and umfa's kernels.
#pragma once

#include <string>

#include "core/export.h"

namespace umfa::metal {

/// "macOS 14.5 (23F79)"
UMFA_CORE_API std::string system_text();
/// Version and a hash of the kernels, since builds of one version may have different kernels.
UMFA_CORE_API const std::string& kernels_text();
/// "2026-11-29T09:13:20Z", now
UMFA_CORE_API std::string time_text();

}  // namespace umfa::metal
