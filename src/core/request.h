// What a binding hands to the core: the tensors and options of one call, none of them checked.
// options.def defines them all.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "core/export.h"
#include "core/operand.h"
#include "core/quant_operand.h"
#include "core/tensor_view.h"

namespace umfa {

/// Where query i and key j have the same position.
enum class Alignment : uint8_t {
    bottom_right,  // j = i + seqlen_kv - seqlen_q: the last query and the last key (flash-attn, MLX)
    top_left,      // j = i: the first query and the first key (torch SDPA, JAX)
};
inline constexpr const char* alignment_names[] = {"bottom_right", "top_left"};
constexpr const auto& names_of(Alignment) { return alignment_names; }

/// How query . key is computed.
enum class QuantMode : uint8_t {
    none,  // in the tensors' dtype
    sage,  // rounded to int8 by row, with exact sums of integers
    int8,  // weights . value too
};
inline constexpr const char* quant_mode_names[] = {"none", "sage", "int8"};
constexpr const auto& names_of(QuantMode) { return quant_mode_names; }

/// Every argument of an attention call.
enum class Field : uint8_t {
#define UMFA_OPERAND(name) name,
#define UMFA_INPUT(name, autocast, text) name,
#define UMFA_TABLE(name, text) name,
#define UMFA_NUMBER(name, value, text) name,
#define UMFA_MAYBE_NUMBER(name, text) name,
#define UMFA_COUNT(name, value, text) name,
#define UMFA_MAYBE_COUNT(name, text) name,
#define UMFA_SEED(name, text) name,
#define UMFA_OFFSET(name, text) name,
#define UMFA_FLAG(name, value, text) name,
#define UMFA_CHOICE(name, type, value, text) name,
#define UMFA_DTYPE(name, text) name,
#define UMFA_FORMAT(name, text) name,
#define UMFA_WINDOW(name, text) name,
#define UMFA_OUTPUT(name) name,
#define UMFA_RESULT_FLAG(name, value) name,
#include "core/options.def"
    count
};
constexpr size_t field_count = static_cast<size_t>(Field::count);

/// The name in options.def.
UMFA_CORE_API const char* name_of(Field field);

/// A public function: its name, how its callers spell the arguments, and the shapes it takes.
struct UMFA_CORE_API Function {
    explicit Function(std::string its_name);

    const std::string& operator[](Field field) const { return names[static_cast<size_t>(field)]; }
    std::string& operator[](Field field) { return names[static_cast<size_t>(field)]; }

    bool operator==(const Function&) const = default;

    std::string name;  // "umfa.flash_attn_func"
    std::array<std::string, field_count> names;
    Layout layout = Layout::bshd;
    /// bhsd only: torch's shapes. There are two dimensions or more. Batch dimensions and nheads
    /// broadcast from size 1 or from not being there.
    bool broadcasts = false;
};

/// The options that are no tensors.
struct AttentionOptions {
#define UMFA_NUMBER(name, value, text) double name = value;
#define UMFA_MAYBE_NUMBER(name, text) std::optional<double> name;
#define UMFA_COUNT(name, value, text) int64_t name = value;
#define UMFA_MAYBE_COUNT(name, text) std::optional<int64_t> name;
#define UMFA_SEED(name, text) std::optional<uint64_t> name;
#define UMFA_OFFSET(name, text) uint64_t name = 0;
#define UMFA_FLAG(name, value, text) bool name = value;
#define UMFA_CHOICE(name, type, value, text) type name = type::value;
#define UMFA_DTYPE(name, text) std::optional<DType> name;
#define UMFA_FORMAT(name, text) std::optional<QuantFormat> name;
#define UMFA_WINDOW(name, text) int64_t name##_left = -1, name##_right = -1;
#define UMFA_RESULT_FLAG(name, value) bool name = value;
#include "core/options.def"

    bool operator==(const AttentionOptions&) const = default;
};

/// How many tables a call can have.
inline constexpr size_t table_count = 0
#define UMFA_TABLE(name, text) +1
#include "core/options.def"
    ;

struct AttentionRequest : AttentionOptions {
    explicit AttentionRequest(const Function& its_function) : function(&its_function) {}

    const Function* function;  // outlives the Problem
    /// Tables lie where the query does. A kernel reads them when the call runs; the host does not.
    bool tables_in_stream = false;
#define UMFA_OPERAND(name) std::optional<TensorView> name;
#define UMFA_INPUT(name, autocast, text) std::optional<TensorView> name;
#define UMFA_TABLE(name, text) std::optional<TensorView> name;
#define UMFA_OUTPUT(name) std::optional<TensorView> name;
#include "core/options.def"

    /// Whether a tensor says where sequences lie.
    bool has_tables() const {
        bool any = max_seqlen_q || max_seqlen_k;
#define UMFA_TABLE(name, text) any = any || name.has_value();
#include "core/options.def"
        return any;
    }
};

/// What a tensor of the request is.
struct TensorField {
    Field field;
    std::optional<TensorView> AttentionRequest::* view;
    bool table;     // of integers on the CPU
    bool autocast;  // torch.autocast casts it
};
inline constexpr TensorField tensor_fields[] = {
#define UMFA_OPERAND(name) {Field::name, &AttentionRequest::name, false, true},
#define UMFA_INPUT(name, autocast, text) {Field::name, &AttentionRequest::name, false, autocast},
#define UMFA_TABLE(name, text) {Field::name, &AttentionRequest::name, true, false},
#define UMFA_OUTPUT(name) {Field::name, &AttentionRequest::name, false, false},
#include "core/options.def"
};

}  // namespace umfa
