// Dropout of probabilities, where the function of philox.h says so.
#pragma once

#include <metal_stdlib>

#include "umfa/indices.h"
#include "umfa/params.h"
#include "umfa/philox.h"

constant bool has_dropout [[function_constant(UMFA_CONSTANT_HAS_DROPOUT)]];

namespace umfa {

using namespace metal;

/// Which of the probabilities at an even column and the next one stay. One evaluation, of which the
/// lane with the other half of the four keys makes the same: to exchange instead would save half of
/// them, where two fragments are at hand.
inline bool2 kept(constant DropoutParams& params, int batch, int head, int row, int column) {
    const PhiloxKey key = {params.key_low, params.key_high};
    const Philox words = dropout_words(key, params.batch_first + uint(batch) * params.batch_step,
                                       uint(head), uint(row), uint(column) / 4);
    const bool upper = column % 4 != 0;
    return bool2((upper ? words.word[2] : words.word[0]) >= params.threshold,
                 (upper ? words.word[3] : words.word[1]) >= params.threshold);
}

}  // namespace umfa
