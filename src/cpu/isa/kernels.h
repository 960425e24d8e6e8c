// The interface between the CPU backend and its kernels: plain structs and function pointers.
// Kernel files are compiled with instructions the running CPU may lack, so nothing here may emit
// code, and they include no standard library header that does.
#pragma once

#include <stdint.h>

#include "umfa/visible.h"

namespace umfa::cpu {

/// One operand of a kernel: first element, and strides in elements.
struct Rows {
    void* data;
    int64_t stride_batch, stride_head, stride_row, stride_channel;
};

struct ForwardArgs {
    Rows query, key, value, out;
    Rows lse;       // data is null when not asked for
    int64_t group;  // query heads that share one key head
    int64_t seqlen_q, seqlen_kv, head_dim, head_dim_v;
    Visible<int64_t> visible;
    float score_scale;      // multiplies q.k; holds log2(e) unless softcap is on
    float score_scale_low;  // what rounding score_scale to float left over
    float softcap;          // softcap * log2(e); 0: off
    const float* slopes;    // ALiBi, null: off
    int64_t slopes_stride_batch, slopes_stride_head;
    int64_t block_q;  // query rows per task, a multiple of `lanes`
};

/// Queries [q_begin, q_begin + block_q) of one head. `scratch`: scratch_floats() floats, 64-byte
/// aligned, contents undefined.
using ForwardFn = void (*)(const ForwardArgs&, int64_t batch, int64_t head, int64_t q_begin,
                           float* scratch);

struct ForwardKernel {
    ForwardFn run;
    int64_t (*scratch_floats)(const ForwardArgs&);
};

struct Kernels {
    const char* name;
    const Kernels* base;  // has what is null here; null: nothing is
    int lanes;            // queries that one panel holds
    ForwardKernel forward_f32, forward_f16, forward_bf16;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels, neon_bf16_kernels;
#endif

}  // namespace umfa::cpu
