#include "metal/build_facts.h"

#include <sys/utsname.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstdint>
#include <ctime>
#include <string_view>

#include "core/instruments.h"

namespace umfa::metal {

std::string system_text() {
#if defined(__APPLE__)
    const auto ask = [](const char* name) {
        char text[64] = {};
        size_t size = sizeof text - 1;
        return sysctlbyname(name, text, &size, nullptr, 0) == 0 ? std::string(text) : "unknown";
    };
    return "macOS " + ask("kern.osproductversion") + " (" + ask("kern.osversion") + ")";
#else
    utsname names{};
    uname(&names);
    return std::string(names.sysname) + " " + names.release;
#endif
}

const std::string& kernels_text() {
    // Never destroyed: a thread that compiles may use it while the process ends.
    static const auto* text = new std::string([] {
        uint64_t hash = 14695981039346656037u;
        const auto add = [&](std::string_view bytes) {
            for (const char c : bytes)
                hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
        };
        for (const char* file :
             {"append.metal", "backward.metal", "backward_mask.metal", "clear.metal",
              "combine.metal", "decode.metal", "decode_vector.metal", "dequantize.metal",
              "forward.metal", "lanes.metal", "quantize.metal", "quantize_scales.metal",
              "row_sums.metal", "sequences.metal"})
            add(shader_text(file));
        add(metallib());
        return std::string(UMFA_VERSION) + " " + std::to_string(hash);
    }());
    return *text;
}

std::string time_text() {
    const std::time_t now = std::time(nullptr);
    std::tm parts{};
    gmtime_r(&now, &parts);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
    return text;
}

}  // namespace umfa::metal
