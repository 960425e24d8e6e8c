// Keys and values from the codes of a quantised format, a vector of channels at a time. The arithmetic
// is that of shared/quant_format.h, so attention sees the numbers that dequantising gives, to the bit:
// each number is multiplied by its scale in a register. Folding scales into scores and probabilities
// would save one multiplication for four products of a group of four heads, and round otherwise.
#pragma once

#include "cpu/isa/code_scales.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/simd.h"
#include "shared/quant_format.h"

namespace umfa::cpu {
namespace {

/// Codes that are read alike, what they have beside a scale, and UMFA_SCALES_INLINE or another kind.
/// Codes of 4 bits are UMFA_CODES_INT4 or UMFA_CODES_Q4_0 here: a table tells them apart.
template <int Codes, int Offset, int Scales = UMFA_SCALES_F32>
struct Coding {
    static constexpr int codes = Codes, offset = Offset, scales = Scales;
};

/// Calls f with the Coding of a format.
template <class F>
UMFA_INLINE void with_coding(const Codes& codes, F&& f) {
    const bool bias = codes.offset_kind == UMFA_OFFSET_BIAS;
    switch (codes.codes) {
        case UMFA_CODES_INT8:
            if (codes.scale_kind == UMFA_SCALES_INLINE)
                return f(Coding<UMFA_CODES_INT8, UMFA_OFFSET_NONE, UMFA_SCALES_INLINE>{});
            return f(Coding<UMFA_CODES_INT8, UMFA_OFFSET_NONE>{});
        case UMFA_CODES_UINT8:
            if (bias) return f(Coding<UMFA_CODES_UINT8, UMFA_OFFSET_BIAS>{});
            return f(Coding<UMFA_CODES_UINT8, UMFA_OFFSET_ZERO>{});
        case UMFA_CODES_E4M3: return f(Coding<UMFA_CODES_E4M3, UMFA_OFFSET_NONE>{});
        case UMFA_CODES_E5M2: return f(Coding<UMFA_CODES_E5M2, UMFA_OFFSET_NONE>{});
        case UMFA_CODES_Q4_0:
            return f(Coding<UMFA_CODES_Q4_0, UMFA_OFFSET_NONE, UMFA_SCALES_INLINE>{});
        case UMFA_CODES_UINT4:
            if (bias) return f(Coding<UMFA_CODES_INT4, UMFA_OFFSET_BIAS>{});
            return f(Coding<UMFA_CODES_INT4, UMFA_OFFSET_ZERO>{});
        default: return f(Coding<UMFA_CODES_INT4, UMFA_OFFSET_NONE>{});
    }
}

/// What all rows of an operand have in common: channels [first, first + channels), and the scales that
/// belong to them.
template <class S>
struct CodeLayout {
    int64_t first = 0, channels = 0;
    int64_t first_byte = 0;
    int64_t first_block = 0, blocks = 0;  // that scales are for
    int64_t
        scale[(max_head_dim + S::W - 1) / S::W];  // of each vector: where those of its block begin
    float table[16] = {};                         // of codes of 4 bits

    CodeLayout() = default;
    /// At most max_head_dim channels; `from` is a multiple of 32. `pitch`: that of the scales.
    CodeLayout(const Codes& codes, int64_t from, int64_t end, int64_t pitch)
        : first(from),
          channels(end - from),
          first_byte(quant_place(codes.codes, codes.scale_kind, from).byte),
          first_block(from / codes.block_channels),
          blocks((end - 1) / codes.block_channels - first_block + 1) {
        for (int64_t c = from, i = 0; c < end; c += S::W, ++i)
            scale[i] = (c / codes.block_channels - first_block) * pitch;
        if (bits_of_codes(codes.codes) == 4)
            for (uint32_t code = 0; code < 16; ++code)
                table[code] = quant_number(codes.codes, code);
    }
};

/// small_float() of shared/quant_format.h, for W codes of 8 bits.
template <class S, int Exponent, int Fraction, int Bias>
inline typename S::vf small_floats(typename S::vu code) {
    using vf = typename S::vf;
    using vu = typename S::vu;
    const vu magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
    const vu normal = (magnitude << (23 - Fraction)) + (static_cast<uint32_t>(127 - Bias) << 23);
    // With an exponent of 1 in place of 0, less what that adds.
    const vf subnormal =
        (vf)(normal + (1u << 23)) - UMFA_FLOAT_OF(static_cast<uint32_t>(128 - Bias) << 23);
    vu bits = magnitude < (1u << Fraction) ? (vu)subnormal : normal;
    if constexpr (Exponent == 5) bits = magnitude == 0x7cu ? vu{} + 0x7f800000u : bits;
    bits |= sign;
    const uint32_t last = Exponent == 5 ? 0x7cu : 0x7eu;
    return (vf)(magnitude > last ? vu{} + 0x7fc00000u : bits);
}

/// The numbers of rows, a vector at a time. Each: every channel has a scale of its own. `room`: from
/// scales to offsets.
template <class S, class C, bool Each>
struct CodeReader {
    using vf = typename S::vf;
    static constexpr int W = S::W;

    const CodeLayout<S>& layout;
    int64_t room;
    typename S::Table table{layout.table};

    /// Vector i of a row. The row must have all of its channels.
    UMFA_INLINE vf whole(const uint8_t* codes, const float* scales, int64_t i) const {
        return elements(numbers(codes + place(i).byte, place(i).shift), scales + layout.scale[i],
                        W);
    }
    /// Vector i, zeros past the row's end.
    vf part(const uint8_t* codes, const float* scales, int64_t i) const {
        const int64_t count = layout.channels - i * W;
        if (count >= W) return whole(codes, scales, i);
        if (count <= 0) return vf{};
        uint8_t bytes[W] = {};
        const int64_t used = bits_of_codes(C::codes) == 8 ? count : (count + 1) / 2;
        for (int64_t b = 0; b < used; ++b) bytes[b] = codes[place(i).byte + b];
        float own[W] = {};
        S::store_part(own, elements(numbers(bytes, 0), scales + layout.scale[i], count), count);
        return S::load(own);
    }
    /// Where vector i lies.
    UMFA_INLINE QuantPlace<int64_t> place(int64_t i) const {
        const int64_t bytes = W * bits_of_codes(C::codes) / 8;
        if constexpr (C::scales != UMFA_SCALES_INLINE)
            return {layout.first_byte + i * bytes, 0};
        else
            return quant_place(C::codes, C::scales, layout.first + i * W);
    }

private:
    /// What W codes stand for, before scale and offset.
    UMFA_INLINE vf numbers(const uint8_t* from, int shift) const {
        using vi = typename S::vi;
        if constexpr (C::codes == UMFA_CODES_INT8)
            return S::to_float(S::load_i8(from));
        else if constexpr (C::codes == UMFA_CODES_UINT8)
            return S::to_float((vi)S::load_u8(from));
        else if constexpr (C::codes == UMFA_CODES_E4M3)
            return small_floats<S, 4, 3, 7>(S::load_u8(from));
        else if constexpr (C::codes == UMFA_CODES_E5M2)
            return small_floats<S, 5, 2, 15>(S::load_u8(from));
        else if constexpr (C::codes == UMFA_CODES_Q4_0)  // W channels in one half of W bytes
            return S::lookup(table, S::load_u8(from) >> shift);
        else
            return S::lookup(table, S::load_halves(from));
    }
    /// `count`: how many channels there are to read scales for.
    UMFA_INLINE vf elements(vf x, const float* scales, int64_t count) const {
        const auto spread = [&](const float* of) {
            if constexpr (!Each) return S::splat(*of);
            return count >= W ? S::load(of) : S::load_part(of, count);
        };
        if constexpr (C::offset == UMFA_OFFSET_BIAS)
            return S::fused(x, spread(scales), spread(scales + room));
        else if constexpr (C::offset == UMFA_OFFSET_ZERO)
            return (x - spread(scales + room)) * spread(scales);
        else
            return x * spread(scales);
    }
};

/// Writes rows of one head. `of(k)`: the KeyPlace of row k; `row(k)`: its codes.
template <class S, class Place, class Row>
inline void write_numbers(const Codes& codes, int64_t head, int64_t count, int64_t channels,
                          float* to, Place&& of, Row&& row) {
    constexpr int W = S::W;
    constexpr int64_t most = max_head_dim;
    static_assert(most % 32 == 0);
    float memory[2 * most];
    for (int64_t first = 0; first < channels; first += most) {
        const int64_t end = channels - first < most ? channels : first + most;
        const CodeLayout<S> layout(codes, first, end, 1);
        const Scales scales{codes, layout.first_block, layout.blocks, memory, 1, most};
        const auto write = [&](const auto& reader) {
            ScalePlace known{-1, -1};
            for (int64_t k = 0; k < count; ++k) {
                const uint8_t* from = row(k);
                const ScalePlace place = scale_place(codes, of(k));
                if (!codes.scales || !(place == known)) {
                    scales.add(0, place, head, from);
                    scales.finish(1);
                    known = place;
                }
                float* own = to + k * channels + first;
                int64_t c = 0;
                for (; c + W <= end - first; c += W)
                    S::store(own + c, reader.whole(from, memory, c / W));
                if (c < end - first)
                    S::store_part(own + c, reader.part(from, memory, c / W), end - first - c);
            }
        };
        with_coding(codes, [&](auto coding) {
            using C = decltype(coding);
            if (codes.block_channels == 1)
                write(CodeReader<S, C, true>{layout, most});
            else
                write(CodeReader<S, C, false>{layout, most});
        });
    }
}

/// One row, for the backend.
template <class S>
inline void numbers_of_key(const Codes& codes, const void* row, int64_t batch, int64_t head,
                           int64_t at, int64_t channels, float* to) {
    write_numbers<S>(
        codes, head, 1, channels, to, [&](int64_t) { return KeyPlace{batch, at}; },
        [&](int64_t) { return static_cast<const uint8_t*>(row); });
}

/// Writes the numbers of keys [first, first + count) to `memory`, and points `rows` at them.
template <class S, class Row>
inline void numbers_of_keys(const ForwardArgs& args, const Codes& codes, const Sequence& sequence,
                            int64_t head, int64_t first, int64_t count, int64_t channels,
                            float* memory, Row* rows) {
    write_numbers<S>(
        codes, head, count, channels, memory,
        [&](int64_t k) { return key_place(sequence, args.page_size, first + k); },
        [&](int64_t k) { return static_cast<const uint8_t*>(static_cast<const void*>(rows[k])); });
    for (int64_t k = 0; k < count; ++k) rows[k] = reinterpret_cast<Row>(memory + k * channels);
}

}  // namespace
}  // namespace umfa::cpu
