#include "core/error.h"

#include <cmath>
#include <cstdio>
#include <utility>

namespace umfa {

Error::Error(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}

// Out of line: gives the class one home for its type information, which the doors catch across
// the library boundary.
Error::~Error() = default;

void fail(ErrorKind kind, std::string_view function, std::string_view what, std::string_view got,
          std::string_view expected) {
    std::string message;
    message.append("[").append(function).append("] ").append(what);
    message.append("; got ").append(got).append("; expected ").append(expected);
    throw Error(kind, std::move(message));
}

std::string text_of(double number) {
    if (std::isnan(number)) return "nan";  // never "-nan"
    // printf instead of std::to_chars: libc++ has the floating-point one only from macOS 13.3.
    char text[40];
    for (int digits = 6; digits <= 17; ++digits) {
        std::snprintf(text, sizeof text, "%.*g", digits, number);
        double back = 0;
        if (std::sscanf(text, "%lf", &back) == 1 && back == number) break;
    }
    return text;
}

}  // namespace umfa
