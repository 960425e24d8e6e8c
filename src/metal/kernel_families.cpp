#include "metal/kernel_families.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <initializer_list>

#include "metal/plan_parts.h"

namespace umfa::metal {
namespace {

bool starts(std::string_view text, std::string_view with) {
    return text.substr(0, with.size()) == with;
}

/// Index of the shape ("_d80_v80_k32") in a kernel's name; the name's length if it has none.
size_t shape_of(std::string_view kernel) {
    for (size_t at = kernel.find("_d"); at != kernel.npos; at = kernel.find("_d", at + 1))
        if (at + 2 < kernel.size() && std::isdigit(static_cast<unsigned char>(kernel[at + 2])))
            return at;
    return kernel.size();
}

/// The larger head dim of a shape.
int head_dim_of(std::string_view shape) {
    int largest = 0;
    for (const char* part : {"_d", "_v"}) {
        const size_t at = shape.find(part);
        if (at != shape.npos)
            largest = std::max(largest, std::atoi(std::string(shape.substr(at + 2)).c_str()));
    }
    return largest;
}

/// "_d" and the first bound that is at least head_dim. Tile sizes change at the bounds.
std::string bounded(int head_dim, std::initializer_list<int> bounds) {
    for (const int bound : bounds)
        if (head_dim <= bound) return "_d" + std::to_string(bound);
    return "_d" + std::to_string(head_dim);
}

bool is_backward(std::string_view name) {
    return starts(name, "dq_") || starts(name, "dkv_") || starts(name, "dmask_");
}

std::string family_of(const std::string& kernel) {
    const size_t at = shape_of(kernel);
    const std::string stem = kernel.substr(0, at);
    const int head_dim = head_dim_of(std::string_view(kernel).substr(at));
    if (starts(kernel, "decode_merge_")) return stem;
    if (starts(kernel, "forward_")) return stem + bounded(head_dim, {64, 128, 256, 576});
    // 640 is 576, padded (backward_shapes.h).
    if (is_backward(kernel)) return stem + bounded(std::min(head_dim, 576), {64, 128, 256, 576});
    if (starts(kernel, "decode_")) return stem + bounded(head_dim, {128, 256});
    // Those of one tensor run together.
    if (starts(kernel, "quantize_")) return "quantize" + stem.substr(stem.rfind('_'));
    if (starts(kernel, "tables")) return "tables";
    // Named by the input dtype; the output dtype is left out.
    if (starts(kernel, "combine_")) return stem.substr(0, stem.rfind('_'));
    return stem;
}

/// The operand type in a family's name: "f16" for "forward_f16_d64".
std::string operands_of(const std::string& family) {
    const std::string_view vector = "decode_vector_";
    const size_t from = starts(family, vector) ? vector.size() : family.find('_') + 1;
    return family.substr(from, shape_of(family) - from);
}

/// Whether a kernel of the family attends, with all options.
bool attends(std::string_view family) {
    return has_matrices(family) || starts(family, "decode_vector_");
}

/// Families of the constants that add arithmetic or addressing to a kernel that attends.
constexpr struct {
    const char* name;
    constant::Index index;
} additions[] = {
    {"rotary_", constant::has_rotary},       {"dropout_", constant::has_dropout},
    {"scores_", constant::has_mask},         {"scores_", constant::has_alibi},
    {"scores_", constant::has_softcap},      {"scores_", constant::has_sinks},
    {"packed_", constant::packs_heads},      {"codes_", constant::has_codes},
    {"sequences_", constant::has_sequences}, {"sequences_", constant::has_pages},
    {"dtypes_", constant::query_kind},       {"dtypes_", constant::key_kind},
    {"dtypes_", constant::value_kind},       {"dtypes_", constant::out_kind},
    {"dtypes_", constant::dout_kind},
};

/// Whether a constant is on; of a kind, whether it is a dtype.
bool is_on(const KernelLaunch& launch, constant::Index index) {
    return std::any_of(launch.constants.begin(), launch.constants.end(), [&](const Constant& own) {
        return own.index == index && own.value != 0 && own.value != UMFA_KIND_CODES;
    });
}

}  // namespace

std::vector<std::string> families_of(const KernelLaunch& launch) {
    std::vector<std::string> families = {family_of(launch.kernel)};
    if (!attends(families[0])) return families;
    const std::string operands = operands_of(families[0]);
    const std::string_view kernel = launch.kernel;
    const std::string first = is_backward(families[0]) ? "backward_" : "";
    for (const auto& addition : additions) {
        const bool decodes = addition.index == constant::has_codes && starts(kernel, "decode_");
        const std::string family = first + (decodes ? "decode_" : "") + addition.name + operands;
        if (is_on(launch, addition.index) && families.back() != family) families.push_back(family);
    }
    return families;
}

bool has_matrices(std::string_view family) {
    return starts(family, "forward_") || is_backward(family) ||
           (starts(family, "decode_") && !starts(family, "decode_merge_") &&
            !starts(family, "decode_vector_"));
}

}  // namespace umfa::metal
