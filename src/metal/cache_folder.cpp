#include "metal/cache_folder.h"

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

namespace umfa::metal {

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

std::string cache_folder() {
    const char* caches = std::getenv("XDG_CACHE_HOME");
    if (caches && *caches == '/') return std::string(caches) + "/umfa";
    const char* home = std::getenv("HOME");
    if (!home || *home != '/') return {};
#if defined(__APPLE__)
    return std::string(home) + "/Library/Caches/umfa";
#else
    return std::string(home) + "/.cache/umfa";
#endif
}

bool make_folder(const std::string& path) {
    for (size_t at = path.find('/', 1); at != path.npos; at = path.find('/', at + 1))
        mkdir(path.substr(0, at).c_str(), 0700);  // most exist
    return mkdir(path.c_str(), 0700) == 0 || errno == EEXIST;
}

std::string content_of(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    std::ostringstream text;
    if (stream) text << stream.rdbuf();
    return text.str();
}

bool replace_file(const std::string& path, const std::string& content) {
    const std::string part = path + "." + std::to_string(getpid());
    {
        std::ofstream stream(part, std::ios::binary);
        stream << content;
        stream.close();
        if (!stream) return false;
    }
    if (std::rename(part.c_str(), path.c_str()) == 0) return true;
    const int problem = errno;
    std::remove(part.c_str());
    errno = problem;
    return false;
}

std::optional<std::string> checked_content(const std::string& path, const std::string& start) {
    const std::string text = content_of(path);
    const size_t last = text.rfind("sum ");
    if (last == text.npos) return {};
    const std::string body = text.substr(0, last);
    if (text.substr(last) != "sum " + digest(body) + "\n") return {};
    if (body.rfind(start, 0) != 0) return {};
    return body;
}

bool replace_checked(const std::string& path, const std::string& text) {
    return replace_file(path, text + "sum " + digest(text) + "\n");
}

}  // namespace umfa::metal
