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

/// Few queries over many keys.
struct DecodeKernel {
    /// All queries of the key heads [head_begin, head_end), over keys [key_begin, key_end), a
    /// multiple of 64 from 0. `part`: for each key head group * seqlen_q rows of row_floats() floats
    /// for merge(), or null: these are all the keys, and the result is written.
    void (*run)(const ForwardArgs&, int64_t batch, int64_t head_begin, int64_t head_end,
                int64_t key_begin, int64_t key_end, float* scratch, float* part);
    /// Writes one row from its parts, which lie `stride` floats apart.
    void (*merge)(const ForwardArgs&, int64_t batch, int64_t head, int64_t row, const float* part,
                  int64_t stride, int64_t parts, float* scratch);
    int64_t (*scratch_floats)(const ForwardArgs&, int64_t heads);
    int64_t (*row_floats)(const ForwardArgs&);
};

struct DtypeKernels {
    ForwardKernel forward;
    DecodeKernel decode;
};

struct Kernels {
    const char* name;
    const Kernels* base;  // has what is null here; null: nothing is
    int lanes;            // queries that one panel holds
    DtypeKernels f32, f16, bf16;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels, neon_bf16_kernels;
#endif

}  // namespace umfa::cpu
