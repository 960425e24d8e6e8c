// How many cores a GPU has, from the I/O registry: Metal does not tell.
#pragma once

#include <cstdint>
#include <optional>

namespace umfa::metal {

/// Of the GPU that Metal gives this `registryID`; nullopt where the registry does not say.
std::optional<int> registered_cores(uint64_t registry_id);

}  // namespace umfa::metal
