// Dropout of probabilities, where the function of philox.h says so.
#pragma once

#include <metal_stdlib>

#include "shared/constants.h"
#include "shared/params.h"
#include "shared/philox.h"

using namespace metal;

namespace umfa {

/// The words of a lane's columns in two neighbouring fragments, of which the first begins at a
/// multiple of 16 keys. `column`: any of the lane's four.
inline Philox words_of(constant DropoutParams& params, int batch, int head, int row, int column) {
    const PhiloxKey key = {params.key_low, params.key_high};
    return dropout_words(key, params.batch_first + uint(batch) * params.batch_step, uint(head),
                         uint(row), uint(column) / 16 * 4 + uint(column) % 8 / 2);
}

/// Makes the probabilities of one of the two fragments 0 where they are dropped: where their word is
/// below `threshold`.
inline void drop(thread float& first, thread float& second, thread const Philox& words,
                 bool second_fragment, uint threshold) {
    const uint a = second_fragment ? words.word[2] : words.word[0];
    const uint b = second_fragment ? words.word[3] : words.word[1];
    first = a >= threshold ? first : 0.0f;
    second = b >= threshold ? second : 0.0f;
}

/// Whether one probability is kept.
inline bool keeps(constant DropoutParams& params, int batch, int head, int row, int column) {
    const Philox words = words_of(params, batch, head, row, column);
    const bool second_fragment = column / 8 % 2 != 0, second = column % 2 != 0;
    const uint of_first = second ? words.word[1] : words.word[0];
    const uint of_second = second ? words.word[3] : words.word[2];
    return (second_fragment ? of_second : of_first) >= params.threshold;
}

}  // namespace umfa
