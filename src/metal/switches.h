// Environment variables that switch something on or off.
#pragma once

#include "core/export.h"

namespace umfa::metal {

/// Whether a variable is not set, empty or "1"; false for "0". Throws `Error` for another value.
UMFA_CORE_API bool is_on(const char* variable);

constexpr const char* archive_switch = "UMFA_PIPELINE_ARCHIVE";
constexpr const char* tuning_switch = "UMFA_TUNE";
constexpr const char* background_switch = "UMFA_BACKGROUND_COMPILE";
// python/umfa/_frameworks reads these.
constexpr const char* stream_switch = "UMFA_TORCH_STREAM";
constexpr const char* graph_switch = "UMFA_MLX_GRAPH";

/// Throws `Error` if one of the backend's variables has a value that it does not know. On every
/// machine, so that a mistake shows where there is no GPU too.
UMFA_CORE_API void check_environment();

}  // namespace umfa::metal
