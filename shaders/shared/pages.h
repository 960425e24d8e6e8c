// Where a row of a sequence that lies in pages is, in one place for every kernel, on the GPU and on the
// CPU. `Int` is int on the GPU and int64_t on the host.
#pragma once

#include "shared/visible.h"

namespace umfa {

/// A page of a sequence, and a row in it.
template <typename Int>
struct PageRow {
    Int page;
    Int row;
};

/// Row `at` of a sequence in pages of `size` rows.
template <typename Int>
UMFA_INLINE PageRow<Int> page_row(Int at, Int size) {
    const Int page = at / size;
    const PageRow<Int> found = {page, at - page * size};
    return found;
}

/// The same where the size is a power of two, whose exponent is given: without a division.
template <typename Int>
UMFA_INLINE PageRow<Int> page_row_by_shift(Int at, Int exponent) {
    const Int page = at >> exponent;
    const PageRow<Int> found = {page, at - (page << exponent)};
    return found;
}

}  // namespace umfa
