// Where the outcome of a self-test is kept: a file for each device, system, umfa and dtype, in the
// user's cache folder. Nothing here throws: without a file, the test runs in each process.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "core/self_test.h"

namespace umfa::metal {

class SelfTestRecord {
public:
    /// `key` says all that the outcome depends on.
    explicit SelfTestRecord(std::string key);
    ~SelfTestRecord();
    SelfTestRecord(const SelfTestRecord&) = delete;
    SelfTestRecord& operator=(const SelfTestRecord&) = delete;

    /// What was kept for the key; nullopt if there is nothing, or nothing sound.
    std::optional<SelfTestReport> read() const;

    /// Waits for other processes that test the same, then keeps them waiting until the end of this.
    void lock(std::chrono::seconds patience);
    /// Families whose test a process began and did not survive. Requires lock().
    std::vector<std::string> unfinished() const;
    void begin(const std::string& family);
    void end(const std::string& family);
    /// Keeps the report, and says in it where, or why not. Forgets what is unfinished.
    void write(SelfTestReport& report);

private:
    void note(const std::string& line);

    std::string key_, file_;
    std::string trouble_;  // why nothing can be kept
    int lock_ = -1;        // of the journal beside the file: "begin forward_f16_d64"
};

}  // namespace umfa::metal
