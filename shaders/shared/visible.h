// Which keys a query sees: causal alignment and sliding window, in one place for every kernel.
//
// Included by the shaders (MSL, C++14 subset) and by the host: arguments by value only, no library
// calls. `Int` is int on the GPU and int64_t on the host.
#pragma once

// Always inlined: on the host this header is compiled once per instruction set, and a shared
// out-of-line copy could hold instructions that the running CPU lacks.
#define UMFA_INLINE inline __attribute__((always_inline))

namespace umfa {

/// Query i sees the keys j with  i + offset - left <= j <= i + offset + right.
/// A negative left or right is unbounded on that side. With a chunk > 0 only the keys of its own
/// chunk: those that have the same quotient by it as i + offset.
template <typename Int>
struct Visible {
    Int seqlen_kv;
    Int offset;  // seqlen_kv - seqlen_q: bottom-right aligned (flash-attn, MLX); 0: top-left (torch)
    Int left;
    Int right;
    Int chunk;
};

/// First key of the chunk that position `center` is in.
template <typename Int>
UMFA_INLINE Int chunk_begin(Int center, Int chunk) {
    const Int rest = center % chunk;
    return center - rest - (rest < 0 ? chunk : 0);
}

/// First visible key of query i, in [0, seqlen_kv].
template <typename Int>
UMFA_INLINE Int visible_begin(Visible<Int> v, Int i) {
    const Int center = i + v.offset;
    Int begin = 0;
    // A window reaching left of key 0 is common: compare before subtracting, so nothing wraps.
    if (v.left >= 0 && center > v.left) begin = center - v.left;
    if (v.chunk > 0) {
        const Int first = chunk_begin(center, v.chunk);
        begin = first > begin ? first : begin;
    }
    return begin < v.seqlen_kv ? begin : v.seqlen_kv;
}

/// One past the last visible key of query i, in [0, seqlen_kv]. Empty when end <= begin.
template <typename Int>
UMFA_INLINE Int visible_end(Visible<Int> v, Int i) {
    const Int center = i + v.offset;
    Int end = v.seqlen_kv;
    if (v.right >= 0 && v.right < v.seqlen_kv - center) end = center + v.right + 1;
    if (v.chunk > 0) {
        const Int first = chunk_begin(center, v.chunk);
        if (v.chunk < end - first) end = first + v.chunk;
    }
    return end > 0 ? end : 0;
}

}  // namespace umfa
