// Routing: which backend carries a Problem out, and why not.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/backend.h"
#include "core/export.h"
#include "core/problem.h"

namespace umfa {

/// `name`: "auto", "cpu" or "metal".
UMFA_CORE_API Verdict can_run(const Problem& problem, std::string_view name);

/// The backend for the problem. Throws `Error` with can_run's reason when there is none.
UMFA_CORE_API const Backend& route(const Problem& problem, std::string_view name);

struct BackendInfo {
    std::string name;
    bool available;
    std::string reason;  // why not; empty when available
};
UMFA_CORE_API std::vector<BackendInfo> backends();

}  // namespace umfa
