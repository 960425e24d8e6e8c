#include "metal/self_test_record.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>
#include <utility>

namespace umfa::metal {
namespace {

constexpr const char* first_line = "umfa self-test 1";

/// FNV-1a: detects damage and names the file. It need not resist deliberate collisions.
std::string digest(std::string_view text) {
    uint64_t hash = 14695981039346656037u;
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
    char hex[17];
    std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(hash));
    return hex;
}

std::string one_line(std::string text) {
    std::replace_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
    return text;
}

std::string error_text(const std::string& path) { return path + ": " + std::strerror(errno); }

/// The user's folder for caches; empty if there is none.
std::string cache_folder() {
    const char* caches = std::getenv("XDG_CACHE_HOME");
    if (caches && *caches == '/') return caches;
    const char* home = std::getenv("HOME");
    if (!home || *home != '/') return {};
#if defined(__APPLE__)
    return std::string(home) + "/Library/Caches";
#else
    return std::string(home) + "/.cache";
#endif
}

/// Makes the folder and its parents. Returns whether the folder exists.
bool make_folder(const std::string& path) {
    for (size_t at = path.find('/', 1); at != path.npos; at = path.find('/', at + 1))
        mkdir(path.substr(0, at).c_str(), 0700);  // most exist
    if (mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return true;
    return false;
}

std::string content_of(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    std::ostringstream text;
    if (stream) text << stream.rdbuf();
    return text.str();
}

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

/// Writes to another name and renames, so that no process reads an incomplete file.
bool replace_file(const std::string& path, const std::string& text) {
    const std::string part = path + "." + std::to_string(getpid());
    {
        std::ofstream stream(part, std::ios::binary);
        stream << text;
        stream.close();
        if (!stream) return false;
    }
    if (std::rename(part.c_str(), path.c_str()) == 0) return true;
    const int problem = errno;
    std::remove(part.c_str());
    errno = problem;
    return false;
}

}  // namespace

SelfTestRecord::SelfTestRecord(std::string key) : key_(one_line(std::move(key))) {
    const std::string folder = cache_folder();
    if (folder.empty())
        trouble_ = "there is no HOME";
    else
        file_ = folder + "/umfa/self-test-" + digest(key_) + ".txt";
}

SelfTestRecord::~SelfTestRecord() {
    if (lock_ >= 0) close(lock_);
}

std::optional<SelfTestReport> SelfTestRecord::read() const {
    const std::string text = content_of(file_);
    const size_t last = text.rfind("sum ");
    if (last == text.npos) return {};
    const std::string body = text.substr(0, last);
    if (text.substr(last) != "sum " + digest(body) + "\n") return {};
    if (body.rfind(std::string(first_line) + "\nkey " + key_ + "\n", 0) != 0) return {};
    SelfTestReport report = report_of(body);
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
    const std::string body = text_of(report, key_);
    if (trouble_.empty() && !replace_file(file_, body + "sum " + digest(body) + "\n"))
        trouble_ = error_text(file_);
    report.kept = trouble_.empty() ? file_ : "";
    report.not_kept = trouble_;
    if (lock_ >= 0 && ftruncate(lock_, 0) != 0) report.not_kept = error_text(file_ + ".journal");
}

}  // namespace umfa::metal
