// Outcome of a backend's test of its kernels on a device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace umfa {

/// A kernel family and its fault; empty if it passed.
struct SelfTestResult {
    std::string family, fault;
};

/// The outcome for one dtype.
struct SelfTestReport {
    std::string dtype, device, system;
    std::string when;  // "2026-11-29T09:13:20Z"
    double seconds = 0;
    int64_t pipelines = 0;  // built for the test
    std::vector<SelfTestResult> results;
    std::vector<std::string> tried_again;  // families during whose case an earlier process ended
    std::string kept;                      // the file that stores it; if empty, not_kept says why
    std::string not_kept;

    bool passed() const {
        return std::all_of(results.begin(), results.end(),
                           [](const SelfTestResult& result) { return result.fault.empty(); });
    }
};

using SelfTestReports = std::vector<std::shared_ptr<const SelfTestReport>>;

}  // namespace umfa
