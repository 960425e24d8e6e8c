// Products of fragments in registers with tiles in threadgroup memory.
#pragma once

#include "shared/fragment.h"
#include "shared/operand.h"
#include "shared/visible.h"

namespace umfa {

/// Two neighbouring bfloats in threadgroup memory, as their bits.
inline uint two_at(threadgroup const bfloat* from) {
    return *reinterpret_cast<threadgroup const uint*>(from);
}

inline void set_widened(thread Fragment<float>& frag, uint first, uint second, bool upper) {
    set(frag, Unpack<float, bfloat>::get(first, upper), Unpack<float, bfloat>::get(second, upper));
}

// Channels are the outer loop of A B^T: the products that follow each other add to different scores, none
// waits for another.

/// S += A B^T, from the rows of B as they lie in threadgroup memory, as elements of E: transposed by the
/// load.
template <int ROW, int FENCES, int QF, int KF, int DF, typename M, typename E>
struct Products {
    UMFA_INLINE static void add(thread Fragment<float> (&s)[QF][KF],
                                thread Fragment<M> (&a)[QF][DF], threadgroup const E* rows,
                                LaneMap) {
#pragma clang loop unroll(full)
        for (int d = 0; d < DF; ++d) {
            if (FENCES >= 1) simdgroup_barrier(mem_flags::mem_none);
#pragma clang loop unroll(full)
            for (int j = 0; j < KF; ++j) {
                Fragment<M> b;
                simdgroup_load(b, rows + j * 8 * ROW + d * 8, ROW, ulong2(0, 0), true);
#pragma clang loop unroll(full)
                for (int f = 0; f < QF; ++f)
                    simdgroup_multiply_accumulate(s[f][j], a[f][d], b, s[f][j]);
            }
        }
    }
};
/// Of bfloat a lane reads two channels of each of its two keys, for two fragments (staged.h). The padding
/// of a row keeps the 32 words of a simdgroup in different banks: rows two apart begin 8 banks apart, or
/// 24.
template <int ROW, int FENCES, int QF, int KF, int DF>
struct Products<ROW, FENCES, QF, KF, DF, float, bfloat> {
    static_assert(DF % 2 == 0, "a channel fragment is left over");
    UMFA_INLINE static void add(thread Fragment<float> (&s)[QF][KF],
                                thread Fragment<float> (&a)[QF][DF], threadgroup const bfloat* rows,
                                LaneMap at) {
        threadgroup const bfloat* own = rows + at.column * ROW + at.row * 2;
#pragma clang loop unroll(full)
        for (int d = 0; d < DF / 2; ++d) {
            if (FENCES >= 1) simdgroup_barrier(mem_flags::mem_none);
            uint first[KF], second[KF];
#pragma clang loop unroll(full)
            for (int j = 0; j < KF; ++j) {
                first[j] = two_at(own + j * 8 * ROW + d * 16);
                second[j] = two_at(own + (j * 8 + 1) * ROW + d * 16);
            }
#pragma clang loop unroll(full)
            for (int c = 0; c < 2; ++c) {
#pragma clang loop unroll(full)
                for (int j = 0; j < KF; ++j) {
                    Fragment<float> b;
                    set_widened(b, first[j], second[j], c != 0);
#pragma clang loop unroll(full)
                    for (int f = 0; f < QF; ++f)
                        simdgroup_multiply_accumulate(s[f][j], a[f][d * 2 + c], b, s[f][j]);
                }
            }
        }
    }
};

/// S += A B^T. The channels of A's fragments are those that Staged::channel names. FENCES: as
/// forward_shapes.h says.
template <int ROW, int FENCES = 0, int QF, int KF, int DF, typename M, typename E>
UMFA_INLINE void add_products(thread Fragment<float> (&s)[QF][KF], thread Fragment<M> (&a)[QF][DF],
                              threadgroup const E* rows, LaneMap at) {
    Products<ROW, FENCES, QF, KF, DF, M, E>::add(s, a, rows, at);
}

/// What a simdgroup hands to those that share its rows: pairs from `mine` on, 32 apart.
template <int QF, int KF>
UMFA_INLINE void write_part(thread Fragment<float> (&s)[QF][KF], threadgroup float2* mine) {
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * KF; ++i) mine[i * 32] = pair_of(s[i / KF][i % KF]);
}

/// The sum of what SPLIT simdgroups wrote, the first of them from `first` on, each `distance` pairs
/// behind the one before. They add in the same order, so that they go on with the same bits.
template <int SPLIT, int QF, int KF>
UMFA_INLINE void sum_parts(thread Fragment<float> (&s)[QF][KF], threadgroup const float2* first,
                           int distance) {
#pragma clang loop unroll(full)
    for (int i = 0; i < QF * KF; ++i) {
        float2 sum = first[i * 32];
#pragma clang loop unroll(full)
        for (int part = 1; part < SPLIT; ++part) sum += first[part * distance + i * 32];
        set_pair(s[i / KF][i % KF], sum);
    }
}

/// Adds the partial scores of SPLIT simdgroups.
template <int SPLIT, int QF, int KF>
UMFA_INLINE void add_parts(thread Fragment<float> (&s)[QF][KF], threadgroup float2* parts,
                           ushort simdgroup, ushort lane) {
    constexpr int SIZE = QF * KF * 32;
    write_part(s, parts + simdgroup * SIZE + lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum_parts<SPLIT>(s, parts + simdgroup / SPLIT * SPLIT * SIZE + lane, SIZE);
}

/// The same of two at once, for one barrier.
template <int SPLIT, int QF, int KF>
UMFA_INLINE void add_two_parts(thread Fragment<float> (&a)[QF][KF],
                               thread Fragment<float> (&b)[QF][KF], threadgroup float2* parts,
                               ushort simdgroup, ushort lane) {
    constexpr int SIZE = QF * KF * 32;
    write_part(a, parts + simdgroup * 2 * SIZE + lane);
    write_part(b, parts + (simdgroup * 2 + 1) * SIZE + lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup const float2* first = parts + simdgroup / SPLIT * SPLIT * 2 * SIZE + lane;
    sum_parts<SPLIT>(a, first, 2 * SIZE);
    sum_parts<SPLIT>(b, first + SIZE, 2 * SIZE);
}

/// A fragment of E in threadgroup memory, as G.
template <typename E>
inline void load_as(thread Fragment<E>& frag, threadgroup const E* from, int row, LaneMap) {
    simdgroup_load(frag, from, row);
}
template <typename G, typename E>
inline void load_as(thread Fragment<G>& frag, threadgroup const E* from, int row, LaneMap) {
    Fragment<E> own;
    simdgroup_load(own, from, row);
    set(frag, G(own.thread_elements()[0]), G(own.thread_elements()[1]));
}
inline void load_as(thread Fragment<float>& frag, threadgroup const bfloat* from, int row,
                    LaneMap at) {
    const uint both = two_at(from + at.row * row + at.column);
    set(frag, Unpack<float, bfloat>::get(both, false), Unpack<float, bfloat>::get(both, true));
}

/// O += P V, from the rows of V as they lie in threadgroup memory.
template <int ROW, int FENCES = 0, int QF, int KF, int DVF, typename G, typename E>
UMFA_INLINE void accumulate(thread Fragment<float> (&o)[QF][DVF], thread Fragment<G> (&p)[QF][KF],
                            threadgroup const E* rows, LaneMap at) {
#pragma clang loop unroll(full)
    for (int j = 0; j < KF; ++j) {
        if (FENCES >= 2) simdgroup_barrier(mem_flags::mem_none);
#pragma clang loop unroll(full)
        for (int d = 0; d < DVF; ++d) {
            Fragment<G> b;
            load_as(b, rows + j * 8 * ROW + d * 8, ROW, at);
#pragma clang loop unroll(full)
            for (int f = 0; f < QF; ++f)
                simdgroup_multiply_accumulate(o[f][d], p[f][j], b, o[f][d]);
        }
    }
}

}  // namespace umfa
