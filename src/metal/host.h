// The portable face of the Objective-C++ host; `backend` is what core/dispatch sees of it.
#pragma once

#include "core/backend.h"
#include "core/export.h"

namespace umfa::metal {

/// Releases the device and everything created on it; the next call creates them again.
UMFA_CORE_API void release();

}  // namespace umfa::metal
