#include "metal/kernel_text.h"

#include <string_view>

#include "shared/params.h"

namespace umfa::metal {

// MTLCompileOptions.preprocessorMacros would not do: Apple's compiler service takes its options as one
// string, divided at spaces, and these values have quotes, commas and spaces.
std::string kernel_defines(const KernelLaunch& launch) {
    std::string text;
    for (const auto& [name, value] : launch.macros) text += "#define " + name + " " + value + "\n";
    return text;
}

std::string constant_defines(const KernelLaunch& launch) {
    std::string text = "#define UMFA_INLINE_CONSTANTS 1\n";
    for (const Constant& constant : launch.constants) {
        const bool is_flag = constant.type == Constant::Type::boolean;
        text += std::string("#define UMFA_VALUE_") + constant.name + " " +
                (is_flag ? (constant.value ? "true" : "false") : std::to_string(constant.value)) +
                "\n";
    }
    return text;
}

size_t sequence_bytes() { return sizeof(SequenceParams); }

std::string kernel_text(const KernelLaunch& launch) {
    const std::string_view shader = shader_text(launch.source);
    if (shader.empty()) return {};
    return kernel_defines(launch).append(shader);
}

}  // namespace umfa::metal
