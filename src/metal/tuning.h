// The record of `python -m umfa tune` in the user's cache folder.
#pragma once

#include <string>

#include "core/export.h"
#include "core/tuning.h"

namespace umfa::metal {

/// The record of this device, or the defaults and why it is not used. UMFA_TUNE=0: the defaults.
UMFA_CORE_API Tuned read_tuning(const std::string& device);
/// Stores the record for this device, and sets what says where and when.
UMFA_CORE_API void keep_tuning(const std::string& device, Tuned& tuned);
/// Throws `Error` for values that no measurement chooses.
UMFA_CORE_API void check_tuning(const Tuning& values);

}  // namespace umfa::metal
