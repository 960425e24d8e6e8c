// Quantised operands: what the bytes of a tensor mean is a property of the operand. A request has, next
// to a tensor's view, its Quantization; a problem has a QuantOperand in place of an Operand.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/checks.h"
#include "core/export.h"
#include "core/operand.h"
#include "shared/quant_format.h"

namespace umfa {

/// With QuantOffset it says which codes there are. Its members name quant_dtype_names.
enum class QuantDType : uint8_t { int8, int4, e4m3, e5m2, nf4, mxfp8, mxfp4, q8_0, q4_0 };
inline constexpr const char* quant_dtype_names[] = {
    "int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4", "mxfp8", "mxfp4", "q8_0", "q4_0"};

/// Which elements share a scale: all; those of a row (one token of one head); block_rows rows by
/// block_channels channels of one head; those of one channel of one head.
enum class Granularity : uint8_t { tensor, row, block, channel };
inline constexpr const char* granularity_names[] = {"tensor", "row", "block", "channel"};

/// UMFA_OFFSET_ of shared/quant_format.h.
enum class QuantOffset : uint8_t { none, zero_point, bias };
inline constexpr const char* quant_offset_names[] = {"none", "zero_point", "bias"};

/// UMFA_SCALES_ of shared/quant_format.h. inside: in front of the codes that they belong to.
enum class QuantScales : uint8_t { f32, f16, bf16, e8m0, inside };
inline constexpr const char* quant_scales_names[] = {"float32", "float16", "bfloat16",
                                                     "float8_e8m0fnu", "inside"};

/// A format as it is asked for. What is absent is the usual of the dtype.
struct QuantChoice {
    QuantDType dtype = QuantDType::int8;
    std::optional<Granularity> granularity;
    QuantOffset offset = QuantOffset::none;
    std::optional<QuantScales> scales;
    std::optional<int64_t> block_rows, block_channels;  // both, or none
};

struct UMFA_CORE_API QuantFormat {
    QuantDType dtype = QuantDType::int8;
    Granularity granularity = Granularity::row;
    QuantOffset offset = QuantOffset::none;
    QuantScales scales = QuantScales::f32;
    int64_t block_rows = 0, block_channels = 0;  // Granularity::block only; 0 channels: all
    int64_t channels = 0;  // head_dim, which the number of bytes does not always tell

    /// Rows share no scale, scales are float32; MX and GGUF: what their specifications say.
    static QuantFormat of(const QuantChoice& choice);

    /// UMFA_CODES_
    int codes() const;
    int scale_kind() const { return static_cast<int>(scales); }
    int offset_kind() const { return static_cast<int>(offset); }
    const char* dtype_name() const { return quant_dtype_names[static_cast<int>(dtype)]; }

    /// Throws `Error` unless umfa has such a format. `writes`: unless umfa quantises to it too; those
    /// of other libraries are only read.
    void check(const Checker& check, bool writes) const;

    bool operator==(const QuantFormat&) const = default;
};

/// What a format's text is: "int4 block none float16 1 32 128".
inline constexpr const char* quant_format_words =
    "dtype, granularity, 'none' or 'zero_point' or 'bias', scale dtype or 'inside', tokens and "
    "channels of a block, head_dim";
UMFA_CORE_API std::string text_of(const QuantFormat& format);
/// nullopt if it is none.
UMFA_CORE_API std::optional<QuantFormat> quant_format_from(std::string_view text);

/// Sizes of a tensor and of what shares a scale.
struct UMFA_CORE_API QuantSizes {
    Layout layout = Layout::bshd;
    int ndim = 4;  // less where there is no batch dimension, or no dimension of heads
    int64_t batch = 1, heads = 1, rows = 0, channels = 0;
    int64_t block_rows = 1, block_channels = 1;  // at least 1
    bool one_block = false;                      // for all heads and indices of the batch

    int64_t row_blocks() const;
    int64_t channel_blocks() const;
    int64_t block_count() const;  // of all heads
    /// The shapes of codes, scales and offsets: dimensions in the order of the layout.
    TensorView data_shape(const QuantFormat& format, const TensorView& like) const;
    std::optional<TensorView> scales_shape(const QuantFormat& format, const TensorView& like) const;
    std::optional<TensorView> offsets_shape(const QuantFormat& format,
                                            const TensorView& like) const;

    /// Of a tensor whose last dimension means `channels` channels. Throws `Error` if the format does
    /// not fit them.
    static QuantSizes make(const Checker& check, const TensorView& view, const std::string& name,
                           const QuantFormat& format, Layout layout, int64_t channels);

private:
    TensorView blocks_shape(DType dtype, const TensorView& like) const;
    TensorView shape(int64_t batch, int64_t heads, int64_t rows, int64_t last, DType dtype,
                     const TensorView& like) const;
};

/// What a request says of a tensor of bytes. None of it is checked.
struct Quantization {
    QuantFormat format;
    std::optional<TensorView> scales;   // absent where they lie inside
    std::optional<TensorView> offsets;  // zero points or biases
};

/// A checked quantised operand. Strides of `data` are in bytes, and a row's bytes follow each other.
/// Strides of scales and offsets go from one block to the next; 0 where one spans the dimension.
struct UMFA_CORE_API QuantOperand {
    QuantFormat format;
    QuantSizes sizes;
    Operand data;
    std::optional<Operand> scales, offsets;

    /// `name`: the argument's, for messages.
    static QuantOperand make(const Checker& check, const TensorView& data, const std::string& name,
                             const Quantization& quantization, Layout layout);
};

/// The view with its strides; 0 for dimensions of size 1 and those that are not there.
Operand strided_operand(const TensorView& view, Layout layout);

/// That a tensor has the shape, dtype and device of `shape`, and memory.
void check_like(const Checker& check, const TensorView& view, const TensorView& shape,
                const std::string& name);

}  // namespace umfa
