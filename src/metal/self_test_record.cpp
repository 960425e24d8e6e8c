#include "metal/self_test_record.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <thread>
#include <utility>

#include "metal/cache_folder.h"

namespace umfa::metal {
namespace {

constexpr const char* first_line = "umfa self-test 1";

std::string text_of(const SelfTestReport& report, const std::string& key) {
    std::ostringstream text;
    text << first_line << "\nkey " << key << "\ndtype " << report.dtype << "\ndevice "
         << one_line(report.device) << "\nsystem " << one_line(report.system) << "\nwhen "
         << report.when << "\nseconds " << report.seconds << "\npipelines " << report.pipelines
         << "\n";
    for (const std::string& family : report.tried_again) text << "again " << family << "\n";
    for (const SelfTestResult& result : report.results) {
        text << "family " << result.family << "\n";
        if (!result.fault.empty()) text << "fault " << one_line(result.fault) << "\n";
    }
    return text.str();
}

SelfTestReport report_of(const std::string& text) {
    SelfTestReport report;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        const size_t space = std::min(line.find(' '), line.size());
        const std::string word = line.substr(0, space);
        std::string rest = space < line.size() ? line.substr(space + 1) : "";
        if (word == "dtype") report.dtype = rest;
        if (word == "device") report.device = rest;
        if (word == "system") report.system = rest;
        if (word == "when") report.when = rest;
        if (word == "seconds") report.seconds = std::atof(rest.c_str());
        if (word == "pipelines") report.pipelines = std::atoll(rest.c_str());
        if (word == "again") report.tried_again.push_back(rest);
        if (word == "family") report.results.push_back({rest, ""});
        if (word == "fault" && !report.results.empty()) report.results.back().fault = rest;
    }
    return report;
}

bool write_all(int file, const std::string& text) {
    return ::write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
}

}  // namespace

SelfTestRecord::SelfTestRecord(std::string key) : key_(one_line(std::move(key))) {
    const std::string folder = cache_folder();
    if (folder.empty())
        trouble_ = "there is no HOME";
    else
        file_ = folder + "/self-test-" + digest(key_) + ".txt";
}

SelfTestRecord::~SelfTestRecord() {
    if (lock_ >= 0) close(lock_);
}

std::optional<SelfTestReport> SelfTestRecord::read() const {
    const std::optional<std::string> text =
        checked_content(file_, std::string(first_line) + "\nkey " + key_ + "\n");
    if (!text) return {};
    SelfTestReport report = report_of(*text);
    report.kept = file_;
    return report;
}

void SelfTestRecord::lock(std::chrono::seconds patience) {
    if (!trouble_.empty()) return;
    const std::string folder = file_.substr(0, file_.rfind('/')), journal = file_ + ".journal";
    if (!make_folder(folder)) {
        trouble_ = error_text(folder);
        return;
    }
    const int opened = open(journal.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (opened < 0) {
        trouble_ = error_text(journal);
        return;
    }
    const auto end = std::chrono::steady_clock::now() + patience;
    while (flock(opened, LOCK_EX | LOCK_NB) != 0) {
        if (std::chrono::steady_clock::now() > end) {
            trouble_ = journal + ": another process has held it for too long";
            close(opened);
            return;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    lock_ = opened;
}

std::map<std::string, int> SelfTestRecord::deaths() const {
    std::map<std::string, int> deaths;
    if (lock_ < 0) return deaths;
    std::istringstream lines(content_of(file_ + ".journal"));
    for (std::string word, family; lines >> word >> family;) {
        if (word == "begin") ++deaths[family];
        if (word == "end") deaths.erase(family);
    }
    return deaths;
}

void SelfTestRecord::note(const std::string& line) {
    if (lock_ < 0) return;
    if (write_all(lock_, line)) return;
    trouble_ = error_text(file_ + ".journal");
}

void SelfTestRecord::begin(const std::string& family) {
    note("begin " + family + "\n");
    if (lock_ >= 0) fsync(lock_);  // the case may crash the whole machine
}

void SelfTestRecord::end(const std::string& family) { note("end " + family + "\n"); }

void SelfTestRecord::write(SelfTestReport& report) {
    if (trouble_.empty() && !replace_checked(file_, text_of(report, key_)))
        trouble_ = error_text(file_);
    report.kept = trouble_.empty() ? file_ : "";
    report.not_kept = trouble_;
    if (lock_ >= 0 && ftruncate(lock_, 0) != 0) report.not_kept = error_text(file_ + ".journal");
}

}  // namespace umfa::metal
