// The portable face of the Objective-C++ host; `backend` is what core/dispatch sees of it.
#pragma once

#include "core/backend.h"
#include "core/export.h"

namespace umfa::metal {

/// Lets go of the device and of all that was made on it; the next call begins anew.
UMFA_CORE_API void release();

}  // namespace umfa::metal
