// Writes the elements of an 8x8 matrix that each lane of a simdgroup holds. The self-test compares
// them with the lane_map of shared/fragment.h, which every kernel with matrices assumes.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "shared/indices.h"
#include "shared/params.h"

using namespace metal;
using namespace umfa;

template <typename T>
[[kernel]] void umfa_lanes(device const T* elements [[buffer(UMFA_LANES_MATRIX)]],
                           device T* held [[buffer(UMFA_LANES_HELD)]],
                           constant LanesParams& params [[buffer(UMFA_LANES_PARAMS)]],
                           uint lane [[thread_index_in_simdgroup]]) {
    simdgroup_matrix<T, 8, 8> loaded;
    simdgroup_load(loaded, elements, params.row);
    held[2 * lane] = loaded.thread_elements()[0];
    held[2 * lane + 1] = loaded.thread_elements()[1];
}

#define UMFA_LANES(NAME, TYPE) \
    template [[host_name(NAME)]] [[kernel]] decltype(umfa_lanes<TYPE>) umfa_lanes<TYPE>;

#ifdef UMFA_KERNEL
UMFA_LANES(UMFA_KERNEL, UMFA_T)
#else
UMFA_LANES("lanes_f16", half)
UMFA_LANES("lanes_bf16", bfloat)
UMFA_LANES("lanes_f32", float)
#endif
