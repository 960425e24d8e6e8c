// Scores of queries and keys that are rounded to int8 on the way into their panels (SageAttention, Zhang
// et al. 2024). Each row has a scale of its own, so that a row of NaN spoils no other. Products are sums of
// integers, which are exact, so all instruction sets give the same.
//
// With `key_means` the mean of each channel of the keys is taken off first: what all keys have in common
// would use up the range of int8. It comes back as one number for each query, and scores stay what they
// are. It stays on those keys whose range it would enlarge: a mean of keys that hold anything, since
// nobody sees them, must not spoil the others.
#pragma once

#include "cpu/isa/pack.h"
#include "cpu/isa/rotary.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

constexpr float integer_magic = 12582912.f;           // 1.5 * 2**23: adding it rounds to an integer
constexpr float least_step = 7.888609052210118e-31f;  // 2**-100: its reciprocal is finite

/// Integers as floats, for instruction sets without sums of bytes: below 2**24 they are exact.
template <class S>
struct FloatIntegers {
    using vf = typename S::vf;
    using query = FloatIntegers;
    using weights = FloatIntegers;
    static constexpr int E = 1;
    static constexpr bool quantised = true, offset = false;

    static vf fma(vf acc, vf a, vf b) { return S::fma(acc, a, b); }
    static vf number(vf sum) { return sum; }
    /// Of integers to which integer_magic was added.
    static vf pack(const vf* x) { return x[0] - integer_magic; }
};
static_assert(max_head_dim * 127 * 127 < 1 << 24);

/// Four bytes in a unit: weights, without a sign, by values.
template <class S>
struct Int8Weights {
    using vf = typename S::vf;
    using vu = typename S::vu;
    static constexpr int E = 4;

    static vf fma(vf acc, vf a, vf b) { return S::dot_i8(acc, b, a); }
    static vf pack(const vf* x) {
        vu unit = (vu)x[0] & 0xffu;
        for (int e = 1; e < E; ++e) unit |= ((vu)x[e] & 0xffu) << (8 * e);
        return (vf)unit;
    }
};

/// Four int8 in a unit. `offset`: S::dot_i8() takes key + 128, where it takes bytes without a sign.
template <class S, bool Offset>
struct Int8Units {
    using query = Int8Units<S, false>;  // queries always have a sign
    using weights = Int8Weights<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    static constexpr int E = 4;
    static constexpr bool quantised = true, offset = Offset;

    static vf fma(vf acc, vf a, vf b) { return S::dot_i8(acc, a, b); }
    template <class Tiles, int C, int A, int B>
    static void multiply_add() {
        Tiles::template multiply_add_int8<C, A, B>();
    }
    static vf number(vf sum) { return S::to_float((vi)sum); }
};

/// U, but for its scores, which are products in units Q.
template <class U, class Q>
struct Int8Scores : U {
    using scores = Q;
};

/// What brings sums of integers to scores: a scale for each key of the tile, and for each lane of a panel
/// what begins the sum, the scale of the query, and query . mean.
struct ScoreScales {
    const float* keys;
    const float* smoothed;  // for each key: all bits where the mean has been taken off, else none
    const float* lanes;     // [begin, scale, shift][lane]
};

/// Sums of integers of MR keys from `first` on -> scores.
template <class S, class Q, int MR>
inline __attribute__((always_inline)) void scale_scores(const ScoreScales& scales, int64_t first,
                                                        typename S::vf (&acc)[MR][S::nv]) {
    using vf = typename S::vf;
    using vu = typename S::vu;
    constexpr int NV = S::nv, W = S::W;
    for (int n = 0; n < NV; ++n) {
        const vf scale = S::load(scales.lanes + (NV + n) * W);
        const vf shift = S::load(scales.lanes + (2 * NV + n) * W);
        for (int m = 0; m < MR; ++m) {
            // The scales first: a sum times one of them may be out of range. So may be their product,
            // and infinity times a sum of 0 is NaN. A product of NaN stays: min() returns its second.
            const vf both = S::min(S::splat(__FLT_MAX__), scale * S::splat(scales.keys[first + m]));
            const vf own = (vf)((vu)shift & (vu)S::splat(scales.smoothed[first + m]));
            acc[m][n] = S::fma(own, Q::number(acc[m][n]), both);
        }
    }
}

/// A row of int8 codes.
struct CodeRow {
    float scale;  // NaN where the row holds NaN or inf; all codes are 0 then
    float shift;  // row . mean
    int32_t sum;  // of the codes
    bool smoothed;
};

/// The largest of the lanes; NaN does not count.
template <class S>
inline float largest_of(typename S::vf x) {
    float most = 0;
    for (int w = 0; w < S::W; ++w) most = x[w] > most ? x[w] : most;
    return most;
}

/// Writes the codes of a row of `channels` elements of type T, in whole vectors of units; zeros up to
/// `units`. `less`, `times`: vectors, zeros past `channels`, or null. `less` is taken off where that does
/// not enlarge the range.
template <class S, class Q, class T>
inline CodeRow quantise_row(const typename T::storage* row, int64_t stride, int64_t channels,
                            const float* less, const float* times, int64_t units, float* to) {
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int W = S::W;
    float x[max_head_dim + W], rest[max_head_dim + W];
    vf largest{}, largest_rest{}, not_finite{}, shift{};
    for (int64_t c = 0; c < channels; c += W) {
        const vf own = row_units<S, FloatUnits<S, T>>(row, stride, c, channels);
        if (less) {
            const vf smooth = own - S::load(less + c);
            S::store(rest + c, smooth);
            largest_rest = S::max((vf)((vu)smooth & 0x7fffffffu), largest_rest);
        }
        if (times) shift = S::fma(shift, own, S::load(times + c));
        S::store(x + c, own);
        not_finite += own * 0.f;
        largest = S::max((vf)((vu)own & 0x7fffffffu), largest);
    }
    CodeRow found{0, 0, 0, less && largest_of<S>(largest_rest) <= largest_of<S>(largest)};
    const float most = largest_of<S>(found.smoothed ? largest_rest : largest);
    const float* numbers = found.smoothed ? rest : x;
    float wrong = 0;
    for (int w = 0; w < W; ++w) {
        wrong += not_finite[w];
        found.shift += shift[w];
    }
    found.scale = most == 0                         ? 0.f
                  : most * (1.f / 127) > least_step ? most * (1.f / 127)
                                                    : least_step;
    const float inverse = most == 0 ? 0.f : 1.f / found.scale;
    if (wrong != 0) found.scale = __builtin_nanf("");
    const vf magic = S::splat(integer_magic);
    vi sum{};
    char* bytes = reinterpret_cast<char*>(to);
    for (int64_t c = 0; c < units * Q::E; c += W) {
        vf code = magic;
        if (c < channels && wrong == 0)
            code = S::fused(S::load(numbers + c), S::splat(inverse), magic);
        if constexpr (Q::E == 1) {
            S::store(to + c, code - magic);
        } else {
            const vi integer = (vi)code - 0x4b400000;  // the bits of magic
            sum += integer;
            // Bytes with 128 added are the same but for their first bit.
            const typename S::vb narrow =
                __builtin_convertvector(Q::offset ? integer ^ 128 : integer, typename S::vb);
            __builtin_memcpy(bytes + c, &narrow, sizeof narrow);
        }
    }
    for (int w = 0; w < W; ++w) found.sum += sum[w];
    return found;
}

/// quantise_row() of a row of element type `type`.
template <class S, class U, class Q>
inline CodeRow quantise_row_of(ElementType type, const typename U::storage* row, int64_t stride,
                               int64_t channels, const float* less, const float* times,
                               int64_t units, float* to) {
    CodeRow found{};
    with_units<S, U>(type, [&](auto own) {
        using T = typename decltype(own)::type;
        found = quantise_row<S, Q, T>(reinterpret_cast<const typename T::storage*>(row), stride,
                                      channels, less, times, units, to);
    });
    return found;
}

/// The mean of each channel of the keys of one sequence and head, rotated where they are. Numbers that
/// are not finite do not count, nor does a mean that is not. Zeros up to whole vectors.
template <class S, class U>
void key_means(const ForwardArgs& args, int64_t batch, int64_t head, float* to) {
    using storage = typename U::storage;
    using vf = typename S::vf;
    constexpr int W = S::W;
    const Sequence& sequence = args.sequences[batch];
    const int64_t channels = args.head_dim;
    alignas(64) char rotated[(max_head_dim + 2 * W) * sizeof(float)];
    float part[max_head_dim + W], counts[max_head_dim + W];
    for (int64_t c = 0; c < channels; c += W) {
        S::store(to + c, vf{});
        S::store(counts + c, vf{});
    }
    constexpr int64_t few = 64;  // keys whose sum is added at a time: less is rounded off
    for (int64_t first = 0; first < sequence.seqlen_kv; first += few) {
        for (int64_t c = 0; c < channels; c += W) S::store(part + c, vf{});
        for (int64_t k = first; k < first + few && k < sequence.seqlen_kv; ++k) {
            const storage* row =
                key_row<const storage>(args.key, sequence, args.page_size, head, k);
            int64_t stride = args.key.stride_channel;
            if (args.rotary.keys) {
                storage* own = reinterpret_cast<storage*>(rotated);
                rotate_row_of<S, U>(args.types.key, args.rotary, row, stride, channels, k, own);
                row = own;
                stride = 1;
            }
            with_units<S, U>(args.types.key, [&](auto units) {
                using T = typename decltype(units)::type;
                for (int64_t c = 0; c < channels; c += W) {
                    const vf x = row_units<S, FloatUnits<S, T>>(
                        reinterpret_cast<const typename T::storage*>(row), stride, c, channels);
                    const auto finite = x * 0.f == 0.f;
                    S::store(part + c, S::load(part + c) + (finite ? x : vf{}));
                    S::store(counts + c, S::load(counts + c) + (finite ? S::splat(1.f) : vf{}));
                }
            });
        }
        for (int64_t c = 0; c < channels; c += W)
            S::store(to + c, S::load(to + c) + S::load(part + c));
    }
    for (int64_t c = 0; c < channels; c += W) {
        const vf mean = S::load(to + c) / S::max(S::load(counts + c), S::splat(1.f));
        S::store(to + c, mean * 0.f == 0.f ? mean : vf{});
    }
}

}  // namespace
}  // namespace umfa::cpu
