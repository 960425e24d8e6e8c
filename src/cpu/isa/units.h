// What the micro-kernels multiply: units of 4 bytes that hold one float or two bfloat16. Both
// products of attention are then one loop over units, whatever the element type.
//
// `E` elements make a unit; `fma(acc, a, b)` adds the product of all E pairs to each lane.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/simd.h"

namespace umfa::cpu {
namespace {

/// Floats, read from T = F32, F16 or BF16 on the way into a panel.
template <class S, class T>
struct FloatUnits {
    using type = T;
    using storage = typename T::storage;
    using product = FloatUnits;
    using scores = FloatUnits;  // what the micro-kernels multiply for scores
    static constexpr bool quantised = false, int8_values = false;
    static constexpr int E = 1;
    static constexpr bool any = false;
    static constexpr bool flushes = false;  // subnormal numbers
    static constexpr bool tiles = false;    // multiplied by matrix registers: see tile_products.h
    using vf = typename S::vf;
    using vi = typename S::vi;

    static vf fma(vf acc, vf a, vf b) { return S::fma(acc, a, b); }
    /// W units from W contiguous elements.
    static vf from_row(const storage* p) { return T::template load<S>(p); }
    /// W units from the same columns of E rows.
    static vf from_rows(const storage* const* rows, int64_t at) {
        return T::template load<S>(rows[0] + at);
    }
    /// One unit from E vectors of floats.
    static vf pack(const vf* x) { return x[0]; }
    /// 0 where every element is finite, else NaN.
    static vf times_zero(vf x) { return x * 0.f; }
    /// x with 0 where p is negative.
    static vf seen(vf x, vf p) { return (vf)((vi)x & ~((vi)p >> 31)); }
    /// x with 0 where the factor is 0, whatever x is there.
    static vf counted(vf x, vf factor) { return factor == 0.f ? vf{} : x; }
    /// Probabilities p with 0 where they are dropped (all bits set, for each of E). The sign
    /// stays: it marks hidden keys.
    static vf without(vf p, const vi* dropped) { return (vf)((vi)p & ~(dropped[0] & 0x7fffffff)); }
};

/// Pairs of bfloat16 for instructions that add two products to a float. Queries, keys and values
/// pass unchanged; probabilities are rounded to bfloat16.
///
/// The instructions take subnormal numbers, and give subnormal results, as 0. That does not matter
/// for scores, unless softmax_scale is near 2**100. Values below 2**-100 are left out of the
/// product (`without_tiny`), and added by ordinary multiplications in the rare tile that holds any
/// (see accumulate_left_out).
template <class S>
struct Bf16Units {
    using type = BF16;
    using storage = uint16_t;
    using product = Bf16Units;
    using scores = Bf16Units;
    static constexpr bool quantised = false, int8_values = false;
    static constexpr int E = 2;
    static constexpr bool any = false;
    static constexpr bool flushes = true;
    static constexpr bool tiles = false;
    static constexpr uint16_t tiny = (127 - 100) << 7;  // 2**-100
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;

    static vf fma(vf acc, vf a, vf b) { return S::fma_bf16(acc, a, b); }
    static vf from_row(const storage* p) {
        vf x;
        __builtin_memcpy(&x, p, sizeof x);
        return x;
    }
    static vf from_rows(const storage* const* rows, int64_t at) {
        return (vf)(S::load_u16(rows[0] + at) | (vu)S::load_bf16(rows[1] + at));
    }
    static vf pack(const vf* x) { return S::pack_bf16(x[0], x[1]); }
    static bool is_left_out(storage x) { return (x & 0x7fff) != 0 && (x & 0x7fff) < tiny; }
    /// x with tiny elements made 0; `found` if there was one that was not 0.
    static vf without_tiny(vf x, bool& found) { return S::without_tiny_bf16(x, tiny, found); }
    static vf times_zero(vf x) { return (vf)((vu)x << 16) * 0.f + (vf)((vu)x & 0xffff0000u) * 0.f; }
    static vf seen(vf x, vf p) {
        const vi high = ((vi)p >> 31) & (vi{} + -65536);
        const vi low = ((vi)((vu)p << 16) >> 31) & (vi{} + 65535);
        return (vf)((vi)x & ~(high | low));
    }
    static vf counted(vf x, vf factor) {
        const vi high = ((vu)factor & 0x7fff0000u) == 0u, low = ((vu)factor & 0x7fffu) == 0u;
        return (vf)((vi)x & ~((high & -65536) | (low & 65535)));
    }
    static vf without(vf p, const vi* dropped) {
        return (vf)((vi)p & ~((dropped[0] & 0x7fff) | (dropped[1] & 0x7fff0000)));
    }
};

/// The same pairs for matrix registers (S::Tiles). Values that are not finite are left out of the
/// product too: a tile's product takes all keys, seen or not.
template <class S>
struct TileUnits : Bf16Units<S> {
    using product = TileUnits;
    using scores = TileUnits;
    static constexpr bool tiles = true;
    using typename Bf16Units<S>::storage;
    using typename Bf16Units<S>::vf;

    static bool is_left_out(storage x) {
        return Bf16Units<S>::is_left_out(x) || (x & 0x7fff) >= 0x7f80;
    }
    static vf without_extremes(vf x) { return S::without_extremes_bf16(x, Bf16Units<S>::tiny); }
    using Extremes = typename S::ExtremesBf16;
    template <class Tiles, int C, int A, int B>
    static void multiply_add() {
        Tiles::template multiply_add_bf16<C, A, B>();
    }
};

/// Floats, converted from the types that ForwardArgs::types gives at run time.
struct Any {
    using storage = char;  // row addresses count bytes
};
template <class S>
struct AnyUnits : FloatUnits<S, F32> {
    using type = Any;
    using storage = char;
    using product = FloatUnits<S, F32>;  // what the micro-kernels see
    static constexpr bool any = true;
};

/// Calls f with U; if U is AnyUnits, with the units of `type`.
template <class S, class U, class F>
UMFA_INLINE void with_units(ElementType type, F&& f) {
    if constexpr (!U::any)
        f(U{});
    else if (type == ElementType::f16)
        f(FloatUnits<S, F16>{});
    else if (type == ElementType::bf16)
        f(FloatUnits<S, BF16>{});
    else
        f(FloatUnits<S, F32>{});
}

/// Rows of a tile, and units of a row.
constexpr int64_t tile_units = 16;

inline int64_t whole_tiles(int64_t units) {
    return (units + tile_units - 1) / tile_units * tile_units;
}

inline int64_t size_of(ElementType element) {
    return element == ElementType::boolean ? 1 : element == ElementType::f32 ? 4 : 2;
}

/// The length of `elements` elements in units of U::storage.
template <class U>
inline int64_t extent(ElementType type, int64_t elements) {
    return U::any ? elements * size_of(type) : elements;
}

}  // namespace
}  // namespace umfa::cpu
