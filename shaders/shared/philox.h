// Dropout's random numbers: Philox-4x32-10 (Salmon et al. 2011). A number depends only on the key
// and on the probability's indices, so every backend and every pass drops the same probabilities.
//
// Included by the shaders (MSL, C++14 subset) and by the host.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define UMFA_HIGH_PRODUCT(a, b) metal::mulhi(a, b)
#else
#include <stdint.h>
#define UMFA_HIGH_PRODUCT(a, b) static_cast<uint32_t>((static_cast<uint64_t>(a) * (b)) >> 32)
#endif

#include "shared/visible.h"

namespace umfa {

struct Philox {
    uint32_t word[4];
};

struct PhiloxKey {
    uint32_t low, high;
};

// Factors of a round, and what the key grows by.
#define UMFA_PHILOX_A 0xd2511f53u
#define UMFA_PHILOX_B 0xcd9e8d57u
#define UMFA_PHILOX_LOW_STEP 0x9e3779b9u
#define UMFA_PHILOX_HIGH_STEP 0xbb67ae85u
#define UMFA_PHILOX_ROUNDS 10

UMFA_INLINE Philox philox(Philox counter, PhiloxKey key) {
    for (int round = 0; round < UMFA_PHILOX_ROUNDS; ++round) {
        const uint32_t a = UMFA_PHILOX_A, b = UMFA_PHILOX_B;
        const uint32_t high_a = UMFA_HIGH_PRODUCT(a, counter.word[0]);
        const uint32_t high_b = UMFA_HIGH_PRODUCT(b, counter.word[2]);
        const Philox next = {{high_b ^ counter.word[1] ^ key.low, b * counter.word[2],
                              high_a ^ counter.word[3] ^ key.high, a * counter.word[0]}};
        counter = next;
        key.low += UMFA_PHILOX_LOW_STEP;
        key.high += UMFA_PHILOX_HIGH_STEP;
    }
    return counter;
}

/// A key is dropped where its word is below p * 2^32. Four keys of one query, whose indices `batch`
/// and `head` are, share an evaluation: of the keys 16 n to 16 n + 15, the pairs 2 i, 2 i + 1 and
/// 2 i + 8, 2 i + 9, in this order, have the words of `four` = 4 n + i. These are what a lane of a GPU
/// holds of two 8x8 fragments, so that it needs all that it computes, and nothing from its neighbours.
UMFA_INLINE Philox dropout_words(PhiloxKey key, uint32_t batch, uint32_t head, uint32_t query,
                                 uint32_t four) {
    const Philox counter = {{four, query, head, batch}};
    return philox(counter, key);
}

/// The key of a call: seed and offset both count in full, since they are mixed once on the host.
UMFA_INLINE PhiloxKey dropout_key(uint64_t seed, uint64_t offset) {
    const Philox counter = {
        {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0u, 0u}};
    const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    const Philox mixed = philox(counter, key);
    const PhiloxKey found = {mixed.word[0], mixed.word[1]};
    return found;
}

}  // namespace umfa
