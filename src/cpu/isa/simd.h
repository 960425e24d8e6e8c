// Vectors of W floats through compiler vector extensions; an instruction set derives from SimdBase
// and replaces what it does better.
//
// Each kernel file defines UMFA_VECTOR_LANES and is compiled with flags of its own. Everything here
// and in the headers that build on it is in an anonymous namespace: code that was compiled for one
// instruction set must not be linked in the place of another's.
#pragma once

#include <stdint.h>

#ifndef UMFA_VECTOR_LANES
#define UMFA_VECTOR_LANES 4
#endif

namespace umfa::cpu {
namespace {

// A constant, not a template parameter: GCC 12 rejects __builtin_convertvector on vectors of
// dependent size.
constexpr int vector_lanes = UMFA_VECTOR_LANES;

template <int... I>
struct Indices {};
template <int Count, int... I>
struct CountTo : CountTo<Count - 1, Count - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
    using type = Indices<I...>;
};

struct SimdBase {
    static constexpr int W = vector_lanes;
    typedef float vf __attribute__((vector_size(4 * W)));
    typedef int32_t vi __attribute__((vector_size(4 * W)));
    typedef uint32_t vu __attribute__((vector_size(4 * W)));
    typedef uint64_t vq __attribute__((vector_size(4 * W)));
    typedef uint16_t vh __attribute__((vector_size(2 * W)));
    typedef int8_t vb __attribute__((vector_size(W)));
    using first_lanes = CountTo<W>::type;

    static constexpr bool native_exponent = false;

    static vf splat(float x) { return x - vf{}; }
    static vf splat_bits(const float* p) {  // 32 bits that need not be a float
        uint32_t bits;
        __builtin_memcpy(&bits, p, sizeof bits);
        return (vf)(vu{} + bits);
    }
    /// acc + a * b, rounded once where the instruction set can. By its instruction, not left to
    /// the compiler: GCC 13 contracted one loop and not another that must give the same bits.
    static vf fma(vf acc, vf a, vf b) { return acc + a * b; }
    /// acc[m] += a[m] * b, in units U: one step of the micro-kernel.
    template <class U, int MR, int NV>
    static inline __attribute__((always_inline)) void multiply_add(vf (&acc)[MR][NV],
                                                                   const float* a,
                                                                   const vf (&b)[NV]) {
        for (int m = 0; m < MR; ++m) {
            const vf am = splat_bits(a + m);
            for (int n = 0; n < NV; ++n) acc[m][n] = U::fma(acc[m][n], am, b[n]);
        }
    }
    /// Products of the lower halves of 64-bit lanes.
    static vq product(vq x, uint32_t factor) {
        return (x & uint64_t{0xffffffffu}) * uint64_t{factor};
    }
    static uint64_t product(uint64_t x, uint32_t factor) { return (x & 0xffffffffu) * factor; }
    static vf load(const float* p) {
        vf x;
        __builtin_memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
    /// A vector from the first n < W elements, zeros behind; src is not read past n.
    static vf load_part(const float* src, int64_t n) {
        float buffer[W] = {};
        for (int64_t i = 0; i < n; ++i) buffer[i] = src[i];
        return load(buffer);
    }
    static void store_part(float* dst, vf x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) dst[i] = x[i];
    }
    /// dst[0, size) = src[0, n) and zeros; src is not read past n. size: a vector of floats, or of
    /// 16-bit elements for one or two of them.
    template <class Element>
    static void fill(const Element* src, int64_t n, Element* dst, int64_t size) {
        for (int64_t i = 0; i < size; ++i) dst[i] = 0;
        for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
    }
    /// dst[0, n) = src[0, n), neither read nor written past that.
    template <class Element>
    static void copy(const Element* src, int64_t n, Element* dst) {
        for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
    }
    /// Whether a bit is set in any lane.
    static bool any(vi x) {
        uint64_t words[W / 2], all = 0;
        __builtin_memcpy(words, &x, sizeof x);
        for (const uint64_t word : words) all |= word;
        return all != 0;
    }
    static vf max(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
    static vf min(vf a, vf b) { return a < b ? a : b; }  // likewise
    static vf to_float(vi x) { return __builtin_convertvector(x, vf); }
    /// a * b + c, rounded once.
    static vf fused(vf a, vf b, vf c) {
        vf x;
        for (int i = 0; i < W; ++i) x[i] = __builtin_fmaf(a[i], b[i], c[i]);
        return x;
    }

    static vu load_u16(const uint16_t* p) {
        vh x;
        __builtin_memcpy(&x, p, sizeof x);
        return __builtin_convertvector(x, vu);
    }
    static void store_u16(uint16_t* p, vu x) {
        vh y = __builtin_convertvector(x, vh);
        __builtin_memcpy(p, &y, sizeof y);
    }

    /// W bytes.
    static vi load_i8(const uint8_t* p) {
        vb x;
        __builtin_memcpy(&x, p, sizeof x);
        return __builtin_convertvector(x, vi);
    }
    static vu load_u8(const uint8_t* p) { return (vu)load_i8(p) & 0xffu; }
    /// W codes of 4 bits, the first in the low half of the first byte. Upper bits may be set.
    static vu load_halves(const uint8_t* p) {
        uint32_t word = 0;
        __builtin_memcpy(&word, p, W / 2);
        vu shift;
        for (int i = 0; i < W; ++i) shift[i] = 4 * static_cast<uint32_t>(i);
        return (vu{} + word) >> shift;
    }
    /// 16 floats, and those that the low 4 bits of each lane choose.
    struct Table {
        float at[16];
        explicit Table(const float* p) { __builtin_memcpy(at, p, sizeof at); }
    };
    static vf lookup(const Table& table, vu code) {
        vf x;
        for (int i = 0; i < W; ++i) x[i] = table.at[code[i] & 15u];
        return x;
    }

    /// a0 b0 a1 b1 ... of the lower or upper halves of a and b.
    template <int First, int... I>
    static vf interleave(vf a, vf b, Indices<I...>) {
        return __builtin_shufflevector(a, b, (First + I / 2 + (I % 2) * W)...);
    }
    static vf interleave_low(vf a, vf b) { return interleave<0>(a, b, first_lanes{}); }
    static vf interleave_high(vf a, vf b) { return interleave<W / 2>(a, b, first_lanes{}); }

    /// Lane i becomes lane i ^ Distance.
    template <int Distance>
    static vf swap(vf x) {
        return swap<Distance>(x, first_lanes{});
    }
    template <int Distance, int... I>
    static vf swap(vf x, Indices<I...>) {
        return __builtin_shufflevector(x, x, (I ^ Distance)...);
    }
    /// Lane i: the sum of lanes i and i ^ Distance; of b where i & Distance, else of a.
    template <int Distance>
    static vf merge(vf a, vf b) {
        return merge<Distance>(a, b, first_lanes{});
    }
    template <int Distance, int... I>
    static vf merge(vf a, vf b, Indices<I...>) {
        return __builtin_shufflevector(a, b, (I + (I & Distance ? W : 0))...) +
               __builtin_shufflevector(a, b, ((I ^ Distance) + (I & Distance ? W : 0))...);
    }

    template <int First, int... I>
    static vq interleave(vq a, vq b, Indices<I...>) {
        return __builtin_shufflevector(a, b, (First + I / 2 + (I % 2) * (W / 2))...);
    }
    static vq interleave_low(vq a, vq b) { return interleave<0>(a, b, CountTo<W / 2>::type{}); }
    static vq interleave_high(vq a, vq b) {
        return interleave<W / 4>(a, b, CountTo<W / 2>::type{});
    }

    /// Rows become columns. Each pass moves one bit of the row number into the lane number.
    static void transpose(vf (&x)[W]) {
        for (int pass = 1; pass < W; pass *= 2) {
            vf y[W];
            for (int i = 0; i < W / 2; ++i) {
                y[2 * i] = interleave_low(x[i], x[i + W / 2]);
                y[2 * i + 1] = interleave_high(x[i], x[i + W / 2]);
            }
            for (int i = 0; i < W; ++i) x[i] = y[i];
        }
    }

    static vf load_bf16(const uint16_t* p) { return (vf)(load_u16(p) << 16); }
    // Round to nearest even; NaN stays a (quiet) NaN.
    static void store_bf16(uint16_t* p, vf x) {
        const vu u = (vu)x;
        const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        store_u16(p, x != x ? (u >> 16) | 0x40u : rounded);
    }

    // Exponent bias 15 -> 127 by integer addition; subnormals by one exact float subtraction.
    static vf load_f16(const uint16_t* p) {
        const vu h = load_u16(p);
        const vu magnitude = (h & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
        const vu normal = magnitude + 0x38000000u;
        const vu special = magnitude + 0x70000000u;  // inf, NaN
        const vf subnormal = (vf)(normal + 0x00800000u) - (vf)(vu{} + 0x38800000u);
        vu bits = exponent == 0x0f800000u ? special : normal;
        bits = exponent == 0u ? (vu)subnormal : bits;
        return (vf)(bits | ((h & 0x8000u) << 16));
    }
    // Round to nearest even, overflow to inf; subnormals by letting a float addition do the
    // rounding.
    static void store_f16(uint16_t* p, vf x) {
        const vu u = (vu)x, sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
        const vu normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
        const vu subnormal = (vu)((vf)a + 0.5f) - 0x3f000000u;
        vu h = a < 0x38800000u ? subnormal : normal;
        h = a >= 0x477ff000u ? vu{} + 0x7c00u : h;  // 65520 and above
        h = a > 0x7f800000u ? vu{} + 0x7e00u : h;
        store_u16(p, h | sign);
    }
};

// The three element types, as the kernels see them. load_two: 2 W elements in the order that is
// cheapest; in_order brings vectors of that order into the elements' own.
template <class T>
struct InOrder {
    template <class S, class Storage>
    static void load_two(const Storage* p, typename S::vf& a, typename S::vf& b) {
        a = T::template load<S>(p);
        b = T::template load<S>(p + S::W);
    }
    template <class S>
    static void in_order(typename S::vf&, typename S::vf&) {}
};
struct F32 : InOrder<F32> {
    using storage = float;
    template <class S>
    static typename S::vf load(const float* p) {
        return S::load(p);
    }
    template <class S>
    static void store(float* p, typename S::vf x) {
        S::store(p, x);
    }
};
struct F16 : InOrder<F16> {
    using storage = uint16_t;
    template <class S>
    static typename S::vf load(const uint16_t* p) {
        return S::load_f16(p);
    }
    template <class S>
    static void store(uint16_t* p, typename S::vf x) {
        S::store_f16(p, x);
    }
};
struct BF16 {
    using storage = uint16_t;
    // Even and odd elements, by one load and two operations instead of four.
    template <class S>
    static void load_two(const uint16_t* p, typename S::vf& a, typename S::vf& b) {
        typename S::vu pairs;
        __builtin_memcpy(&pairs, p, sizeof pairs);
        a = (typename S::vf)(pairs << 16);
        b = (typename S::vf)(pairs & 0xffff0000u);
    }
    template <class S>
    static void in_order(typename S::vf& a, typename S::vf& b) {
        const typename S::vf even = a, odd = b;
        a = S::interleave_low(even, odd);
        b = S::interleave_high(even, odd);
    }
    template <class S>
    static typename S::vf load(const uint16_t* p) {
        return S::load_bf16(p);
    }
    template <class S>
    static void store(uint16_t* p, typename S::vf x) {
        S::store_bf16(p, x);
    }
};

}  // namespace
}  // namespace umfa::cpu
