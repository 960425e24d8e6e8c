// Stores the outcome of a self-test in the user's cache folder: a file for each device, system,
// umfa build and dtype. Failing to store is no error: the test then runs in each process.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>

#include "core/self_test.h"

namespace umfa::metal {

class SelfTestRecord {
public:
    /// `key` contains everything that the outcome depends on.
    explicit SelfTestRecord(std::string key);
    ~SelfTestRecord();
    SelfTestRecord(const SelfTestRecord&) = delete;
    SelfTestRecord& operator=(const SelfTestRecord&) = delete;

    /// The stored report for the key; nullopt if there is none or it is damaged.
    std::optional<SelfTestReport> read() const;

    /// Locks the record against other processes until destruction; waits up to `patience`.
    void lock(std::chrono::seconds patience);
    /// For each family, how many processes in a row ended during its case. Requires lock().
    std::map<std::string, int> deaths() const;
    void begin(const std::string& family);
    void end(const std::string& family);
    /// Stores the report, and sets its `kept` and `not_kept`. Clears deaths().
    void write(SelfTestReport& report);

private:
    void note(const std::string& line);

    std::string key_, file_;
    std::string trouble_;  // why nothing can be stored
    int lock_ = -1;        // of the journal beside the file: "begin forward_f16_d64"
};

}  // namespace umfa::metal
