// Tables of the kernels for one element type and for mixed types. Each kernel file includes it.
#pragma once

#include "cpu/isa/append.h"
#include "cpu/isa/backward_kernel.h"
#include "cpu/isa/combine_kernel.h"
#include "cpu/isa/decode_kernel.h"
#include "cpu/isa/forward_kernel.h"
#include "cpu/isa/int8_values.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/quant_rows.h"

namespace umfa::cpu {
namespace {

/// S: the vectors; U: what the micro-kernels multiply.
template <class S, class U>
constexpr DtypeKernels dtype_kernels{
    {forward_block<S, U>, forward_scratch_floats<S, U>, most_block_rows, most_block_floats},
    {decode_keys<S, U>, decode_merge<S, U>, decode_scratch_floats<S, U>, decode_row_floats<S>},
    append_row<S, typename U::type>,
    {combine_add<S, typename U::type>, combine_store<S, typename U::type>}};

template <class S>
constexpr DtypeKernels mixed_kernels{
    {forward_block<S, AnyUnits<S>>, forward_scratch_floats<S, AnyUnits<S>>, most_block_rows,
     most_block_floats},
    {decode_keys<S, AnyUnits<S>>, decode_merge<S, AnyUnits<S>>,
     decode_scratch_floats<S, AnyUnits<S>>, decode_row_floats<S>},
    append_any<S>,
    {}};

template <class S, class U, class Work>
constexpr ForwardKernel forward_kernel{forward_block<S, U, Work>, forward_scratch_floats<S, U>,
                                       most_block_rows, most_block_floats};

/// Scores in units Q, the rest as U.
template <class S, class U, class Q, class Own = Int8Scores<U, Q>>
constexpr Int8Kernel int8_score_kernel{
    forward_kernel<S, Own, ForwardBlock<S, Own>>, {}, key_means<S, U>};

template <class S, class U, class Q, class Own = Int8Values<U, Q>>
constexpr Int8Kernel int8_kernel{int8_score_kernel<S, U, Q>.scores,
                                 forward_kernel<S, Own, Int8Block<S, Own>>, key_means<S, U>};

template <class S, class Q>
constexpr Int8Kernels int8_kernels{
    int8_kernel<S, FloatUnits<S, F32>, Q>, int8_kernel<S, FloatUnits<S, F16>, Q>,
    int8_kernel<S, FloatUnits<S, BF16>, Q>, int8_kernel<S, AnyUnits<S>, Q>};

template <class S, class U = AnyUnits<S>>
constexpr BackwardKernel backward_kernel{backward_prepare<S>, backward_run<S, U>,
                                         backward_scratch_floats<S, U>, backward_sizes<S, U>};

}  // namespace
}  // namespace umfa::cpu
