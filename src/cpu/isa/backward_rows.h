// Rows of a backward pass: what each query needs before it, copies of rows into panels, and the rows that
// it writes.
#pragma once

#include "cpu/isa/backward_scratch.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

/// Where a row of delta and pivots is.
inline int64_t statistics_at(const BackwardArgs& args, const SequenceHead& head) {
    return args.first_row[head.sequence] +
           head.head * rounded_up(args.sequences[head.sequence].seqlen_q, statistics_step);
}

/// sum(a[i] * b[i]) of two rows of any type.
template <class S>
inline float dot(ElementType type_a, const char* a, int64_t stride_a, ElementType type_b,
                 const char* b, int64_t stride_b, int64_t channels) {
    typename S::vf sum{};
    for (int64_t c = 0; c < channels; c += S::W)
        sum += numbers<S>(type_a, a + c * stride_a * size_of(type_a), stride_a, channels - c) *
               numbers<S>(type_b, b + c * stride_b * size_of(type_b), stride_b, channels - c);
    float total = 0;
    for (int i = 0; i < S::W; ++i) total += sum[i];
    return total;
}

/// A row of less than this has seen no key, or none whose mask is not about the lowest finite number. The
/// log-sum-exp of the latter does not tell how many keys share the row, and its gradient is 0.
constexpr float lowest_log_sum = -1e37f;

template <class S>
void backward_prepare(const BackwardArgs& args, const SequenceHead& head) {
    const Sequence& sequence = args.sequences[head.sequence];
    const int64_t rows = sequence.seqlen_q, at = statistics_at(args, head);
    const auto log_sum = [&](const Rows& from, int64_t row) {
        return *reinterpret_cast<const float*>(
            query_row<const char>(from, sequence, head.head, row));
    };
    for (int64_t row = 0; row < rounded_up(rows, statistics_step); ++row) {
        float *pivot = args.pivot + at + row, *low = args.pivot_low + at + row,
              *delta = args.delta + at + row;
        *pivot = __builtin_inff();
        *low = *delta = 0;
        const float lse = row < rows ? log_sum(args.lse, row) : -__builtin_inff();
        if (lse < lowest_log_sum) continue;
        const double log2 = double{lse} * umfa::log2_e;
        *pivot = static_cast<float>(log2);
        *low = __builtin_isfinite(lse) ? static_cast<float>(log2 - *pivot) : 0.f;
        *delta = dot<S>(args.types.dout, query_row<const char>(args.dout, sequence, head.head, row),
                        args.dout.stride_channel, args.types.out,
                        query_row<const char>(args.out, sequence, head.head, row),
                        args.out.stride_channel, args.head_dim_v) -
                 (args.dlse.data ? log_sum(args.dlse, row) : 0.f);
    }
}

/// Copies rows into panels of channels, to[channels / N][unit of rows][N], with zeros for missing rows and
/// channels, up to `height` rows. False if there is inf or NaN.
template <class S, class AllUnits>
inline bool pack_row_panels(ElementType type, const char* const* rows, int64_t count,
                            int64_t stride_channel, int64_t height, int64_t channels, float* to) {
    constexpr int64_t W = S::W, N = S::nv * S::W;
    typename S::vf not_finite{};
    with_units<S, AllUnits>(type, [&](auto units) {
        using U = decltype(units);
        using storage = typename U::storage;
        for (int64_t c = 0; c < channels; c += N)
            for (int64_t r = 0; r < height; r += U::E, to += N)
                for (int64_t n = 0; n < N; n += W) {
                    typename S::vf x{};
                    if (r < count && c + n < channels) {
                        const auto* row = reinterpret_cast<const storage*>(rows[r]);
                        if constexpr (U::E == 1) {
                            x = row_units<S, U>(row, stride_channel, c + n, channels);
                        } else {
                            const storage* pair[] = {
                                row, r + 1 < count ? reinterpret_cast<const storage*>(rows[r + 1])
                                                   : nullptr};
                            x = paired_channels<S, U>(pair, stride_channel, c + n, channels);
                        }
                    }
                    not_finite += U::times_zero(x);
                    S::store(to + n, x);
                }
    });
    bool finite = true;
    for (int i = 0; i < S::W; ++i) finite &= not_finite[i] == 0;
    return finite;
}

/// One row of a gradient: x * scale, rounded to its type.
template <class S>
inline void store_gradient(ElementType type, const float* x, float scale, int64_t channels,
                           char* to, int64_t stride) {
    constexpr int W = S::W;
    with_units<S, AnyUnits<S>>(type, [&](auto units) {
        using T = typename decltype(units)::type;
        auto* row = reinterpret_cast<typename T::storage*>(to);
        int64_t c = 0;
        for (; stride == 1 && c + W <= channels; c += W)
            T::template store<S>(row + c, S::load(x + c) * scale);
        for (; c < channels; c += W) {
            typename T::storage buffer[W];
            T::template store<S>(buffer, S::load(x + c) * scale);
            for (int64_t i = 0; i < W && c + i < channels; ++i) row[(c + i) * stride] = buffer[i];
        }
    });
}

}  // namespace
}  // namespace umfa::cpu
