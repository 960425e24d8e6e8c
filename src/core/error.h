// The one error type. Every message reads "[function] what; got ...; expected ...".
#pragma once

#include <exception>
#include <string>
#include <string_view>

#include "core/export.h"

namespace umfa {

enum class ErrorKind {
    value,        // the caller passed a value that cannot be right      -> ValueError
    type,         // the caller passed something of the wrong type       -> TypeError
    unsupported,  // the request is sound, umfa cannot do it (yet)       -> umfa.UnsupportedError
    memory,       // an allocation failed                                -> MemoryError
    device,       // a GPU or its driver failed                          -> RuntimeError
    internal,     // a bug in umfa                                       -> RuntimeError
};

class UMFA_CORE_API Error : public std::exception {
public:
    Error(ErrorKind kind, std::string message);
    ~Error() override;
    const char* what() const noexcept override { return message_.c_str(); }
    ErrorKind kind() const noexcept { return kind_; }

private:
    ErrorKind kind_;
    std::string message_;
};

/// Throws `Error` with the text "[function] what; got `got`; expected `expected`".
[[noreturn]] UMFA_CORE_API void fail(ErrorKind kind, std::string_view function,
                                     std::string_view what, std::string_view got,
                                     std::string_view expected);

/// Shortest text that reads back as the same number: 0.125, nan, -inf.
UMFA_CORE_API std::string text_of(double number);

}  // namespace umfa
