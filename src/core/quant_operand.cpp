#include "core/quant_operand.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <type_traits>

namespace umfa {
namespace {

constexpr int64_t channels_step = 16;  // of blocks: a kernel reads 16 codes at once

bool is_integer(QuantDType dtype) { return dtype == QuantDType::int8 || dtype == QuantDType::int4; }
bool is_mx(QuantDType dtype) { return dtype == QuantDType::mxfp8 || dtype == QuantDType::mxfp4; }
bool is_gguf(QuantDType dtype) { return dtype == QuantDType::q8_0 || dtype == QuantDType::q4_0; }

const char* name_of(Granularity granularity) {
    return granularity_names[static_cast<int>(granularity)];
}
const char* name_of(QuantScales scales) { return quant_scales_names[static_cast<int>(scales)]; }

std::string block_text(const QuantFormat& format) {
    return "(" + std::to_string(format.block_rows) + ", " + std::to_string(format.block_channels) +
           ")";
}

DType dtype_of(QuantScales scales) {
    switch (scales) {
        case QuantScales::f32: return DType::f32;
        case QuantScales::f16: return DType::f16;
        case QuantScales::bf16: return DType::bf16;
        case QuantScales::e8m0:
        case QuantScales::inside: break;
    }
    return DType::u8;
}

/// Scales that a format may have.
void check_scales(const Checker& check, const QuantFormat& format) {
    const QuantScales scales = format.scales;
    bool fits = scales == QuantScales::f32 || scales == QuantScales::f16;
    std::string expected = "float32 or float16";
    if (is_mx(format.dtype)) {
        fits = scales == QuantScales::e8m0;
        expected = "float8_e8m0fnu";
    } else if (is_gguf(format.dtype)) {
        fits = scales == QuantScales::inside;
        expected = "scales inside of the data";
    } else if (format.offset == QuantOffset::bias) {
        fits = fits || scales == QuantScales::bf16;
        expected += " or bfloat16";
    }
    if (!fits)
        check.unsupported(std::string("scale_dtype does not fit ") + format.dtype_name(),
                          name_of(scales), expected);
}

void check_block(const Checker& check, const QuantFormat& format) {
    const bool given = format.block_rows != 0 || format.block_channels != 0;
    if (format.granularity != Granularity::block) {
        if (given)
            check.value(std::string("block is given with granularity='") +
                            name_of(format.granularity) + "'",
                        block_text(format), "None, or granularity='block'");
        return;
    }
    if (!given)
        check.value("block is missing, which granularity='block' needs", "None",
                    "(tokens, channels), channels a multiple of " + std::to_string(channels_step));
    if (format.block_rows < 1 || format.block_channels < 0 ||
        format.block_channels % channels_step != 0)
        check.value("block is impossible", block_text(format),
                    "(tokens, channels): tokens at least 1, channels a multiple of " +
                        std::to_string(channels_step) + ", or None for all");
}

/// Formats whose blocks are given: those of OCP MX, MLX and GGUF.
void check_fixed_block(const Checker& check, const QuantFormat& format) {
    const bool affine = format.offset == QuantOffset::bias;
    if (!affine && !is_mx(format.dtype) && !is_gguf(format.dtype)) return;
    const std::string what = affine ? "MLX's affine groups" : format.dtype_name();
    if (format.granularity != Granularity::block)
        check.unsupported("granularity does not fit " + what, name_of(format.granularity),
                          "'block'");
    const int64_t channels = format.block_channels;
    const bool fits = affine ? channels == 32 || channels == 64 || channels == 128 : channels == 32;
    if (format.block_rows != 1 || !fits)
        check.unsupported("block does not fit " + what, block_text(format),
                          affine ? "(1, 32), (1, 64) or (1, 128)" : "(1, 32)");
}

}  // namespace

QuantFormat QuantFormat::of(const QuantChoice& choice) {
    const bool fixed = is_mx(choice.dtype) || is_gguf(choice.dtype);
    QuantFormat format;
    format.dtype = choice.dtype;
    format.offset = choice.offset;
    format.granularity = choice.granularity.value_or(fixed ? Granularity::block : Granularity::row);
    format.scales = choice.scales.value_or(is_mx(choice.dtype)     ? QuantScales::e8m0
                                           : is_gguf(choice.dtype) ? QuantScales::inside
                                                                   : QuantScales::f32);
    const bool usual = fixed && format.granularity == Granularity::block;
    format.block_rows = choice.block_rows.value_or(usual ? 1 : 0);
    format.block_channels = choice.block_channels.value_or(usual ? UMFA_MX_BLOCK : 0);
    return format;
}

int QuantFormat::codes() const {
    const bool is_signed = offset == QuantOffset::none;
    switch (dtype) {
        case QuantDType::int8: return is_signed ? UMFA_CODES_INT8 : UMFA_CODES_UINT8;
        case QuantDType::int4: return is_signed ? UMFA_CODES_INT4 : UMFA_CODES_UINT4;
        case QuantDType::e4m3:
        case QuantDType::mxfp8: return UMFA_CODES_E4M3;
        case QuantDType::e5m2: return UMFA_CODES_E5M2;
        case QuantDType::nf4: return UMFA_CODES_NF4;
        case QuantDType::mxfp4: return UMFA_CODES_E2M1;
        case QuantDType::q8_0: return UMFA_CODES_INT8;
        case QuantDType::q4_0: return UMFA_CODES_Q4_0;
    }
    return UMFA_CODES_INT8;
}

std::string text_of(const QuantFormat& format) {
    std::string text = format.dtype_name();
    text.append(" ").append(name_of(format.granularity));
    text.append(" ").append(quant_offset_names[format.offset_kind()]);
    text.append(" ").append(name_of(format.scales));
    for (const int64_t number : {format.block_rows, format.block_channels, format.channels})
        text.append(" ").append(std::to_string(number));
    return text;
}

std::optional<QuantFormat> quant_format_from(std::string_view text) {
    QuantFormat format;
    std::string_view words[7];
    for (size_t i = 0; i < std::size(words); ++i) {
        const size_t end = text.find(' ');
        words[i] = text.substr(0, end);
        const bool is_last = end == std::string_view::npos;
        if (is_last != (i + 1 == std::size(words))) return {};
        if (!is_last) text.remove_prefix(end + 1);
    }
    const auto named = [](std::string_view word, const auto& names, auto& found) {
        for (size_t i = 0; i < std::size(names); ++i)
            if (word == names[i]) {
                found = static_cast<std::remove_reference_t<decltype(found)>>(i);
                return true;
            }
        return false;
    };
    const auto number = [](std::string_view word, int64_t& found) {
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), found);
        return error == std::errc() && end == word.data() + word.size();
    };
    const bool fits = named(words[0], quant_dtype_names, format.dtype) &&
                      named(words[1], granularity_names, format.granularity) &&
                      named(words[2], quant_offset_names, format.offset) &&
                      named(words[3], quant_scales_names, format.scales) &&
                      number(words[4], format.block_rows) &&
                      number(words[5], format.block_channels) && number(words[6], format.channels);
    return fits ? std::optional(format) : std::nullopt;
}

void QuantFormat::check(const Checker& check, bool writes) const {
    if (writes && (is_gguf(dtype) || offset == QuantOffset::bias))
        check.unsupported("umfa reads this format and does not write it",
                          is_gguf(dtype) ? dtype_name() : "biases",
                          "int8, int4, float8_e4m3fn, float8_e5m2, nf4, mxfp8 or mxfp4");
    if (offset != QuantOffset::none && !is_integer(dtype))
        check.unsupported(std::string(dtype_name()) + " has a sign and no zero point",
                          "symmetric=False", "symmetric=True, or int8 or int4");
    check_block(check, *this);
    check_fixed_block(check, *this);
    check_scales(check, *this);
}

int64_t QuantSizes::row_blocks() const {
    return one_block ? 1 : (rows + block_rows - 1) / block_rows;
}

int64_t QuantSizes::channel_blocks() const {
    return one_block ? 1 : (channels + block_channels - 1) / block_channels;
}

int64_t QuantSizes::block_count() const {
    return (one_block ? 1 : batch * heads) * row_blocks() * channel_blocks();
}

TensorView QuantSizes::shape(int64_t of_batch, int64_t of_heads, int64_t of_rows, int64_t last,
                             DType dtype, const TensorView& like) const {
    TensorView view;
    view.ndim = ndim;
    view.dtype = dtype;
    view.device = like.device;
    view.device_id = like.device_id;
    const bool rows_first = layout == Layout::bshd;
    const int64_t sizes[] = {of_batch, rows_first ? of_rows : of_heads,
                             rows_first ? of_heads : of_rows, last};
    std::copy_n(sizes + 4 - ndim, ndim, view.shape);
    int64_t stride = 1;
    for (int i = ndim; i-- > 0; stride *= view.shape[i]) view.strides[i] = stride;
    return view;
}

TensorView QuantSizes::data_shape(const QuantFormat& format, const TensorView& like) const {
    const bool is_signed = format.codes() == UMFA_CODES_INT8 && !is_gguf(format.dtype);
    const int64_t bytes = quant_row_bytes(format.codes(), format.scale_kind(), channels);
    return shape(batch, heads, rows, bytes, is_signed ? DType::i8 : DType::u8, like);
}

TensorView QuantSizes::blocks_shape(DType dtype, const TensorView& like) const {
    return shape(one_block ? 1 : batch, one_block ? 1 : heads, row_blocks(), channel_blocks(),
                 dtype, like);
}

std::optional<TensorView> QuantSizes::scales_shape(const QuantFormat& format,
                                                   const TensorView& like) const {
    if (format.scales == QuantScales::inside) return {};
    return blocks_shape(dtype_of(format.scales), like);
}

std::optional<TensorView> QuantSizes::offsets_shape(const QuantFormat& format,
                                                    const TensorView& like) const {
    if (format.offset == QuantOffset::none) return {};
    const bool bias = format.offset == QuantOffset::bias;
    return blocks_shape(bias ? dtype_of(format.scales) : DType::u8, like);
}

QuantSizes QuantSizes::make(const Checker& check, const TensorView& view, const std::string& name,
                            const QuantFormat& format, Layout layout, int64_t channels) {
    const bool rows_first = layout == Layout::bshd;
    if (view.ndim > 4 || view.ndim < (rows_first ? 3 : 2))
        check.value(name + " has the wrong number of dimensions", shape_text(view),
                    rows_first ? "(batch, seqlen, nheads, head_dim) or (seqlen, nheads, head_dim)"
                               : "(batch, nheads, seqlen, head_dim), or without the first ones");
    if (channels < 1)
        check.value("head_dim of " + name + " is too small", std::to_string(channels), "1 or more");
    const int64_t block = format.block_channels;
    const bool whole = is_gguf(format.dtype) || format.offset == QuantOffset::bias;
    if (whole && channels % block != 0)
        check.value("head_dim of " + name + " is not made of whole blocks",
                    std::to_string(channels), "a multiple of " + std::to_string(block));
    QuantSizes sizes;
    sizes.layout = layout;
    sizes.ndim = view.ndim;
    sizes.batch = size_at(view, 4);
    sizes.heads = size_at(view, rows_first ? 2 : 3);
    sizes.rows = size_at(view, rows_first ? 3 : 2);
    sizes.channels = channels;
    sizes.one_block = format.granularity == Granularity::tensor;
    sizes.block_rows = sizes.block_channels = 1;
    switch (format.granularity) {
        case Granularity::tensor:
            sizes.block_rows = std::max<int64_t>(1, sizes.rows);
            sizes.block_channels = channels;
            break;
        case Granularity::row: sizes.block_channels = channels; break;
        case Granularity::channel: sizes.block_rows = std::max<int64_t>(1, sizes.rows); break;
        case Granularity::block:
            sizes.block_rows = format.block_rows;
            sizes.block_channels = block > 0 ? std::min(block, channels) : channels;
            break;
    }
    return sizes;
}

Operand strided_operand(const TensorView& view, Layout layout) {
    const bool rows_first = layout == Layout::bshd;
    Operand operand;
    operand.view = view;
    operand.stride_batch = stride_at(view, 4);
    operand.stride_head = stride_at(view, rows_first ? 2 : 3);
    operand.stride_row = stride_at(view, rows_first ? 3 : 2);
    operand.stride_channel = stride_at(view, 1);
    return operand;
}

void check_like(const Checker& check, const TensorView& view, const TensorView& shape,
                const std::string& name) {
    if (view.ndim != shape.ndim || !std::equal(view.shape, view.shape + view.ndim, shape.shape))
        check.value(name + " has the wrong shape", shape_text(view), shape_text(shape));
    // Codes of float8 may come as what they are.
    const bool float8 = view.dtype == DType::f8e4m3 || view.dtype == DType::f8e5m2;
    if (view.dtype != shape.dtype && !(float8 && shape.dtype == DType::u8))
        check.type(name + " has the wrong dtype", name_of(view.dtype), name_of(shape.dtype));
    check_same_device(check, view, name, shape);
    check_memory(check, view, name);
}

QuantOperand QuantOperand::make(const Checker& check, const TensorView& data,
                                const std::string& name, const Quantization& quantization,
                                Layout layout) {
    QuantOperand operand;
    operand.format = quantization.format;
    operand.format.check(check, false);
    operand.sizes =
        QuantSizes::make(check, data, name, operand.format, layout, operand.format.channels);
    check_like(check, data, operand.sizes.data_shape(operand.format, data), name);
    if (stride_at(data, 1) > 1 || stride_at(data, 1) < 0)
        check.value("the last dimension of " + name + " is not contiguous",
                    "stride " + std::to_string(stride_at(data, 1)), "stride 1");
    operand.data = strided_operand(data, layout);
    const auto part = [&](const std::optional<TensorView>& given,
                          const std::optional<TensorView>& shape, const std::string& called) {
        std::optional<Operand> found;
        if (given.has_value() != shape.has_value())
            check.value(
                called + " of " + name + (given ? " are given" : " are missing"),
                given ? "a tensor" : "None",
                shape ? "a tensor of shape " + shape_text(*shape) : "None: this format has none");
        if (given) {
            check_like(check, *given, *shape, called + " of " + name);
            found = strided_operand(*given, layout);
        }
        return found;
    };
    operand.scales =
        part(quantization.scales, operand.sizes.scales_shape(operand.format, data), "scales");
    operand.offsets = part(quantization.offsets, operand.sizes.offsets_shape(operand.format, data),
                           operand.format.offset == QuantOffset::bias ? "biases" : "zero points");
    return operand;
}

}  // namespace umfa
