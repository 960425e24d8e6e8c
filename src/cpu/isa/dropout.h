// Dropout: shared/philox.h for many probabilities at a time.
//
// A word lies in the lower half of a 64-bit lane, where one multiplication gives a whole product.
// The upper halves are ignored, so words need no shuffles between rounds.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/pack.h"
#include "cpu/isa/units.h"

namespace umfa::cpu {
namespace {

/// The rounds of philox(). A word that all lanes share stays a scalar until it is mixed with a
/// vector. done(word 0, ..., word 3): vectors, unless the lanes shared all of the counter.
template <class S, int Rounds, class A, class B, class C, class D, class Done>
inline __attribute__((always_inline)) void philox_rounds(A a, B b, C c, D d, PhiloxKey key,
                                                         Done&& done) {
    if constexpr (Rounds == 0) {
        done(a, b, c, d);
    } else {
        const auto p = S::product(a, UMFA_PHILOX_A);
        const auto q = S::product(c, UMFA_PHILOX_B);
        philox_rounds<S, Rounds - 1>(
            (q >> 32) ^ b ^ uint64_t{key.low}, q, (p >> 32) ^ d ^ uint64_t{key.high}, p,
            PhiloxKey{key.low + UMFA_PHILOX_LOW_STEP, key.high + UMFA_PHILOX_HIGH_STEP},
            static_cast<Done&&>(done));
    }
}

/// dropout_words() with a vector for `query` or for `quad`, and scalars for the others.
template <class S, class Query, class Quad, class Done>
inline __attribute__((always_inline)) void dropout_lanes(PhiloxKey key, uint64_t batch,
                                                         uint64_t head, Query query, Quad quad,
                                                         Done&& done) {
    philox_rounds<S, UMFA_PHILOX_ROUNDS>(quad, query, head, batch, key, static_cast<Done&&>(done));
}

/// Lanes 2 i from the lower halves of `even`, lanes 2 i + 1 from those of `odd`.
template <class S>
inline typename S::vu joined(typename S::vq even, typename S::vq odd) {
    return (typename S::vu)((even & uint64_t{0xffffffffu}) | (odd << 32));
}

/// `batch` in Dropout's own count.
inline uint64_t dropout_batch(const Dropout& dropout, int64_t batch) {
    return static_cast<uint32_t>(dropout.batch_first + batch * dropout.batch_step);
}

/// Drops probabilities of one panel: keys [first, last) of the tile that begins at `tile`, as
/// exponentials() leaves them. Up to 15 more keys on either side are computed: sixteen keys share
/// their random words, and a tile has a multiple of 16 keys.
template <class S, class U>
__attribute__((noinline)) void drop_panel(const Dropout& dropout, int64_t batch, int64_t head,
                                          int64_t query, int64_t tile, int64_t first, int64_t last,
                                          float* units) {
    using vq = typename S::vq;
    using vi = typename S::vi;
    constexpr int NV = S::nv, W = S::W, E = U::E;
    static_assert(block_kv % 16 == 0 && 2 % E == 0);
    vq even;
    for (int i = 0; i < W / 2; ++i) even[i] = static_cast<uint64_t>(query + 2 * i);
    const uint64_t index = dropout_batch(dropout, batch);
    const auto drop_four = [&](int64_t k, uint64_t four, int n) {
        vq half[2][4];
        for (uint64_t odd = 0; odd < 2; ++odd)
            dropout_lanes<S>(dropout.key, index, static_cast<uint64_t>(head),
                             even + (odd + static_cast<uint64_t>(n * W)), four,
                             [&](vq a, vq b, vq c, vq d) {
                                 half[odd][0] = a;
                                 half[odd][1] = b;
                                 half[odd][2] = c;
                                 half[odd][3] = d;
                             });
        vi dropped[4];
        for (int e = 0; e < 4; ++e)
            dropped[e] = (vi)(joined<S>(half[0][e], half[1][e]) < dropout.threshold);
        for (int e = 0; e < 4; e += E) {
            const int64_t key = k + e % 2 + e / 2 * 8;
            float* at = units + (key / E * NV + n) * W;
            S::store(at, U::without(S::load(at), dropped + e));
        }
    };
    for (int64_t k = first / 16 * 16; k < last; k += 16)
        for (int i = 0; i < 4; ++i)
            for (int n = 0; n < NV; ++n)
                drop_four(k + 2 * i, static_cast<uint64_t>((tile + k) / 4 + i), n);
}

/// Drops probabilities of one query: the `keys` keys from `first`, a multiple of 16, on. `p` has
/// room for a multiple of 16 and of two vectors.
template <class S>
__attribute__((noinline)) void drop_keys(const Dropout& dropout, int64_t batch, int64_t head,
                                         int64_t query, int64_t first, int64_t keys, float* p) {
    using vi = typename S::vi;
    using vu = typename S::vu;
    using vq = typename S::vq;
    constexpr int W = S::W;
    constexpr int64_t together = 2 * W < 16 ? 16 : 2 * W;  // keys
    constexpr int run = W < 8 ? W : 8;                     // of neighbours in a vector of words
    const uint64_t index = dropout_batch(dropout, batch);
    vq four;
    for (int i = 0; i < W / 2; ++i) four[i] = static_cast<uint64_t>(first / 4 + i);
    for (int64_t k = 0; k < keys; k += together) {
        alignas(64) uint32_t words[together];
        for (int64_t done = 0; done < together; done += 2 * W) {
            dropout_lanes<S>(
                dropout.key, index, static_cast<uint64_t>(head), static_cast<uint64_t>(query), four,
                [&](vq a, vq b, vq c, vq d) {
                    const vu both[] = {joined<S>(a, b), joined<S>(c, d)};
                    for (int later = 0; later < 2; ++later)
                        for (int i = 0; i < W; i += run)
                            __builtin_memcpy(
                                words + done / 16 * 16 + done % 16 / 2 + i * 2 + later * 8,
                                reinterpret_cast<const uint32_t*>(&both[later]) + i,
                                run * sizeof(uint32_t));
                });
            four += static_cast<uint64_t>(W / 2);
        }
        for (int64_t n = 0; n < together; n += W) {
            vu own;
            __builtin_memcpy(&own, words + n, sizeof own);
            const vi dropped = (vi)(own < dropout.threshold);
            S::store(p + k + n, FloatUnits<S, F32>::without(S::load(p + k + n), &dropped));
        }
    }
}

}  // namespace
}  // namespace umfa::cpu
