// umfa's folder in the user's caches, and files there that are checked for damage and replaced
// whole. Nothing here throws: without a folder, umfa works and stores nothing.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "core/export.h"

namespace umfa::metal {

/// FNV-1a: detects damage and names files. It need not resist deliberate collisions.
UMFA_CORE_API std::string digest(std::string_view text);
UMFA_CORE_API std::string one_line(std::string text);
/// "PATH: why the last system call failed"
UMFA_CORE_API std::string error_text(const std::string& path);

/// The folder, with "/umfa" at its end; empty if the user has none.
UMFA_CORE_API std::string cache_folder();
/// Makes the folder and its parents. Returns whether the folder exists.
UMFA_CORE_API bool make_folder(const std::string& path);

/// Empty if the file cannot be read.
UMFA_CORE_API std::string content_of(const std::string& path);
/// Writes to another name and renames, so that no process reads an incomplete file.
UMFA_CORE_API bool replace_file(const std::string& path, const std::string& content);

/// The text of a file that replace_checked() wrote, if it is whole and starts with `start`.
UMFA_CORE_API std::optional<std::string> checked_content(const std::string& path,
                                                         const std::string& start);
/// Stores the text with a checksum.
UMFA_CORE_API bool replace_checked(const std::string& path, const std::string& text);

}  // namespace umfa::metal
