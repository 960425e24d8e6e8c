// Text between C++ and Foundation, and Metal's errors as umfa's.
#pragma once

#import <Metal/Metal.h>

#include <string>
#include <string_view>

#include "core/error.h"

namespace umfa::metal {

inline NSString* ns_string(std::string_view text) {
    return [[NSString alloc] initWithBytes:text.data()
                                    length:text.size()
                                  encoding:NSUTF8StringEncoding];
}

inline std::string text_of(NSString* string) {
    const char* text = string.UTF8String;
    return text ? text : "";
}

/// "Caused GPU Timeout Error (MTLCommandBufferErrorDomain 2)"
inline std::string text_of(NSError* error) {
    if (!error) return "no error from Metal";
    return text_of(error.localizedDescription) + " (" + text_of(error.domain) + " " +
           std::to_string(error.code) + ")";
}

/// Throws the `Error` that describes a failed command buffer. `where`: which of several, or empty.
[[noreturn]] void fail_command_buffer(std::string_view function, NSError* error,
                                      const std::string& where);

}  // namespace umfa::metal
