// What a backend found when it tested the kernels of its device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace umfa {

/// A family of kernels, and what is wrong with it: nothing if empty.
struct SelfTestResult {
    std::string family, fault;
};

/// Of the kernels for tensors of one dtype.
struct SelfTestReport {
    std::string dtype, device, system;
    std::string when;  // "2026-11-29T09:13:20Z"
    double seconds = 0;
    int64_t pipelines = 0;  // that were built for it
    std::vector<SelfTestResult> results;
    std::string kept;  // the file that has it; else empty, and why in not_kept
    std::string not_kept;

    bool passed() const {
        return std::all_of(results.begin(), results.end(),
                           [](const SelfTestResult& result) { return result.fault.empty(); });
    }
};

using SelfTestReports = std::vector<std::shared_ptr<const SelfTestReport>>;

}  // namespace umfa
