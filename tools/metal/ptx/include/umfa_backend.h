// The NVIDIA back end of the stand-in Metal headers: a simdgroup is a warp, a threadgroup a block.
//
// Hardware lane n reports Apple lane b with b4=n4, b3=n1, b2=n3, b1=n2, b0=n0. Then the two elements
// of an 8x8 matrix that Apple gives to a lane are those that mma.m16n8k8 gives it in its upper half,
// for A and C; a B operand is one movmatrix away. The permutation is linear over xor, so that a
// shuffle by xor stays one. Everything is inline: LLVM sees through it.
#pragma once
#include "umfa_builtins.h"
#include "umfa_keywords.h"

// The entry that the package writes is the kernel; Metal's own function is inlined into it.
#define UMFA_KERNEL inline __attribute__((always_inline))
#define UMFA_CONVERGENT __attribute__((convergent))
#define UMFA_INLINE_HEADER inline __attribute__((always_inline))
#define UMFA_INLINE_CONVERGENT inline __attribute__((always_inline, convergent))

#include "umfa_ptx_math.h"

namespace umfa_backend {

/// On the CPU this keeps the optimiser from what a GPU would not know. Here it is the GPU's.
UMFA_INLINE_HEADER unsigned long hide(unsigned long address) { return address; }

constexpr unsigned everyone = 0xffffffffU;

UMFA_INLINE_HEADER unsigned hardware_thread() { return __nvvm_read_ptx_sreg_tid_x(); }
UMFA_INLINE_HEADER unsigned hardware_lane() { return hardware_thread() & 31; }
UMFA_INLINE_HEADER constexpr unsigned apple_lane(unsigned n) {
    return (n & 16) | (n & 2) << 2 | (n & 8) >> 1 | (n & 4) >> 1 | (n & 1);
}
UMFA_INLINE_HEADER constexpr unsigned lane_of_apple(unsigned b) {
    return (b & 16) | (b & 4) << 1 | (b & 2) << 1 | (b & 8) >> 2 | (b & 1);
}

UMFA_INLINE_HEADER unsigned lane() { return apple_lane(hardware_lane()); }
UMFA_INLINE_HEADER unsigned matrix_row() { return hardware_lane() >> 2; }
UMFA_INLINE_HEADER unsigned matrix_column() { return (hardware_lane() & 3) * 2; }

// ---- shuffles, reductions, scans ----------------------------------------------------------------

/// Any value as whole 32-bit words.
template <typename T>
struct words {
    static constexpr int count = (sizeof(T) + 3) / 4;
    int word[count];
};

template <typename T, typename Move>
UMFA_INLINE_CONVERGENT T move_words(T value, Move move) {
    words<T> w{};
    __builtin_memcpy(&w, &value, sizeof(T));
    for (int i = 0; i < words<T>::count; i++) w.word[i] = move(w.word[i]);
    __builtin_memcpy(&value, &w, sizeof(T));
    return value;
}

/// The value that Apple lane `source` passes in.
template <typename T>
UMFA_INLINE_CONVERGENT T shuffle(T value, unsigned source) {
    const int from = static_cast<int>(lane_of_apple(source & 31));
    return move_words(value,
                      [=](int w) { return __nvvm_shfl_sync_idx_i32(everyone, w, from, 31); });
}
/// What a shuffle reads that asks for a lane which the group does not have: its own value.
UMFA_INLINE_HEADER unsigned past_edge(int) { return lane(); }

template <typename T>
UMFA_INLINE_CONVERGENT T shuffle_xor(T value, unsigned mask) {
    const int flip = static_cast<int>(lane_of_apple(mask & 31));
    return move_words(value,
                      [=](int w) { return __nvvm_shfl_sync_bfly_i32(everyone, w, flip, 31); });
}

/// In a fixed order, the same for all lanes.
template <typename Op, typename T>
UMFA_INLINE_CONVERGENT T reduce(T value) {
    for (unsigned mask = 1; mask < 32; mask *= 2)
        value = Op::apply(value, shuffle_xor(value, mask));
    return value;
}

template <typename Op, bool inclusive, typename T>
UMFA_INLINE_CONVERGENT T scan(T value) {
    const unsigned own = lane();
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const T before = shuffle(value, own - distance);
        if (own >= distance) value = Op::apply(before, value);
    }
    if constexpr (!inclusive) {
        const T before = shuffle(value, own - 1);
        value = own == 0 ? Op::template identity<T>() : before;
    }
    return value;
}

/// Over the four lanes of each quadgroup.
template <typename Op, typename T>
UMFA_INLINE_CONVERGENT T quad_reduce(T value) {
    for (unsigned mask = 1; mask < 4; mask *= 2) value = Op::apply(value, shuffle_xor(value, mask));
    return value;
}
template <typename Op, bool inclusive, typename T>
UMFA_INLINE_CONVERGENT T quad_scan(T value) {
    const unsigned own = lane() % 4, first = lane() - own;
    for (unsigned distance = 1; distance < 4; distance *= 2) {
        const T before = shuffle(value, first + (own - distance) % 4);
        if (own >= distance) value = Op::apply(before, value);
    }
    if constexpr (!inclusive) {
        const T before = shuffle(value, first + (own + 3) % 4);
        value = own == 0 ? Op::template identity<T>() : before;
    }
    return value;
}

UMFA_INLINE_CONVERGENT unsigned first_active_lane() {
    unsigned mask, first;
    asm volatile("activemask.b32 %0;" : "=r"(mask));
    asm volatile("redux.sync.min.u32 %0, %1, %2;" : "=r"(first) : "r"(lane()), "r"(mask));
    return first;
}

// ---- matrices -----------------------------------------------------------------------------------

template <typename T>
struct matrix_pair {
    typedef T type __attribute__((ext_vector_type(2)));
};

// movmatrix and mma depend on their inputs alone. Their asm is not volatile, so that equal ones are
// computed once and unused ones not at all; it is convergent, so that none moves under a condition.
// peephole.py knows the text of transpose_16bit.

/// Of an 8x8 matrix of 16-bit elements.
UMFA_INLINE_CONVERGENT unsigned transpose_16bit(unsigned x) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
/// Of an 8x8 matrix of any elements: those of 32 bits in two halves.
template <typename Pair>
UMFA_INLINE_CONVERGENT Pair transpose(Pair x) {
    if constexpr (sizeof(Pair) == 4) {
        return __builtin_bit_cast(Pair, transpose_16bit(__builtin_bit_cast(unsigned, x)));
    } else {
        typedef unsigned words_of_pair __attribute__((ext_vector_type(2)));
        const words_of_pair w = __builtin_bit_cast(words_of_pair, x);
        const unsigned low = transpose_16bit((w[0] & 0xffff) | w[1] << 16);
        const unsigned high = transpose_16bit(w[0] >> 16 | (w[1] & 0xffff0000U));
        return __builtin_bit_cast(
            Pair, words_of_pair{(low & 0xffff) | high << 16, low >> 16 | (high & 0xffff0000U)});
    }
}

typedef float float_pair __attribute__((ext_vector_type(2)));

// The other half of the 16x8 product is of a matrix of zeros, and what it is added to is left unset:
// nobody reads it, and setting it would cost as much as the product. peephole.py knows this text.
#define UMFA_MULTIPLY_16BIT(name, type)                                            \
    UMFA_INLINE_CONVERGENT float_pair name(unsigned a, unsigned b, float_pair c) { \
        float d0, d1, unused0, unused1;                                            \
        asm("{ .reg .f32 z; mma.sync.aligned.m16n8k8.row.col.f32." type "." type   \
            ".f32 "                                                                \
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, z, z}; }"                  \
            : "=f"(d0), "=f"(d1), "=f"(unused0), "=f"(unused1)                     \
            : "r"(a), "r"(0), "r"(b), "f"(c[0]), "f"(c[1]));                       \
        return float_pair{d0, d1};                                                 \
    }
UMFA_MULTIPLY_16BIT(multiply_half, "f16")
UMFA_MULTIPLY_16BIT(multiply_bfloat, "bf16")
#undef UMFA_MULTIPLY_16BIT

/// By value: of an element of a vector, __builtin_bit_cast takes the first whichever was meant.
UMFA_INLINE_HEADER unsigned bits(float x) { return __builtin_bit_cast(unsigned, x); }
UMFA_INLINE_HEADER float to_tf32(float x) {
    float r;
    [[clang::noconvergent]] asm("cvt.rna.tf32.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
/// The sum over k takes columns of A and rows of B in any order, if both in the same: Apple's 2t is
/// k=t here and 2t+1 is k=t+4, so the elements need not change lanes.
UMFA_INLINE_CONVERGENT float_pair multiply_tf32(float_pair a, float_pair b, float_pair c) {
    float d0, d1, unused0, unused1;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %6, %5, %6}, {%7, %8}, {%9, %10, %11, %11};"
        : "=f"(d0), "=f"(d1), "=f"(unused0), "=f"(unused1)
        : "r"(bits(a[0])), "r"(bits(a[1])), "r"(0), "r"(bits(b[0])), "r"(bits(b[1])), "f"(c[0]),
          "f"(c[1]), "f"(0.0f));
    return float_pair{d0, d1};
}
/// float as the sum of two tf32; what is left out of a product is below 2^-21 of it.
struct split {
    float_pair high, low;
    UMFA_INLINE_HEADER explicit split(float_pair x) {
        for (int i = 0; i < 2; i++) {
            high[i] = to_tf32(x[i]);
            low[i] = to_tf32(x[i] - high[i]);
        }
    }
};
/// half and bfloat are tf32 already, and have no low part.
UMFA_INLINE_CONVERGENT float_pair multiply_float(float_pair a, bool a_exact, float_pair b,
                                                 bool b_exact, float_pair c) {
    const split x(a), y(b);
    if (!a_exact) c = multiply_tf32(x.low, y.high, c);
    if (!b_exact) c = multiply_tf32(x.high, y.low, c);
    return multiply_tf32(x.high, y.high, c);
}

enum matrix_type : unsigned { half_type, bfloat_type, float_type };

UMFA_INLINE_HEADER float_pair widen(const void* pair, unsigned type) {
    typedef half half_pair __attribute__((ext_vector_type(2)));
    typedef bfloat bfloat_pair __attribute__((ext_vector_type(2)));
    if (type == half_type) return __builtin_convertvector(*(const half_pair*)pair, float_pair);
    if (type == bfloat_type) return __builtin_convertvector(*(const bfloat_pair*)pair, float_pair);
    return *(const float_pair*)pair;
}
UMFA_INLINE_HEADER void narrow(void* pair, float_pair x, unsigned type) {
    typedef half half_pair __attribute__((ext_vector_type(2)));
    typedef bfloat bfloat_pair __attribute__((ext_vector_type(2)));
    if (type == half_type) {
        *(half_pair*)pair = __builtin_convertvector(x, half_pair);
    } else if (type == bfloat_type) {
        *(bfloat_pair*)pair = __builtin_convertvector(x, bfloat_pair);
    } else {
        *(float_pair*)pair = x;
    }
}

// ---- memory -------------------------------------------------------------------------------------

/// Of 8 rows of 16 bytes, of which lane n points to row n % 8. LLVM's own intrinsics.
unsigned load_matrix(const threadgroup void* row) __asm__(
    "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x1.b16.p3");
unsigned load_transposed(const threadgroup void* row) __asm__(
    "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x1.trans.b16.p3");

/// By ldmatrix, if the compiler knows that the rows are aligned for it. Followed by a movmatrix,
/// which goes where a B operand would transpose the matrix back, and else by the load's transposing
/// itself (shared_loads.py).
template <typename T>
UMFA_INLINE_CONVERGENT bool load_rows(const threadgroup T* source, unsigned long elements_per_row,
                                      bool transposed, unsigned& pair) {
    if (sizeof(T) != 2) return false;
    const threadgroup T* row = source + (hardware_lane() & 7) * elements_per_row;
    const unsigned long beyond = (unsigned long)row % 16;
    if (!__builtin_constant_p(beyond) || beyond != 0) return false;
    pair = transpose_16bit(transposed ? load_matrix(row) : load_transposed(row));
    return true;
}
template <typename T>
UMFA_INLINE_HEADER bool load_rows(const device T*, unsigned long, bool, unsigned&) {
    return false;
}

// A pair moves as one word where its address allows, which LLVM mostly knows (threadgroup variables
// are aligned to 16 bytes) and the kernel otherwise asks. Transposed matrices are loaded as they lie
// and then transposed, which costs nothing where a B operand would transpose them back.
template <typename Pair>
UMFA_INLINE_HEADER Pair words_as(unsigned word) {
    Pair pair{};
    __builtin_memcpy(&pair, &word, sizeof word);
    return pair;
}
#define UMFA_MEMORY(space)                                                                         \
    template <typename T>                                                                          \
    UMFA_INLINE_HEADER typename matrix_pair<T>::type load_pair(const space T* p) {                 \
        typedef typename matrix_pair<T>::type pair;                                                \
        if ((unsigned long)p % sizeof(pair) == 0) return *(const space pair*)p;                    \
        return pair{p[0], p[1]};                                                                   \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_CONVERGENT typename matrix_pair<T>::type matrix_load(                              \
        const space T* source, unsigned long elements_per_row, bool transposed) {                  \
        unsigned rows;                                                                             \
        if (load_rows(source, elements_per_row, transposed, rows))                                 \
            return words_as<typename matrix_pair<T>::type>(rows);                                  \
        const auto pair = load_pair(source + matrix_row() * elements_per_row + matrix_column());   \
        return transposed ? transpose(pair) : pair;                                                \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_CONVERGENT void matrix_store(typename matrix_pair<T>::type value, space T* target, \
                                             unsigned long elements_per_row, bool transposed) {    \
        typedef typename matrix_pair<T>::type pair;                                                \
        if (transposed) value = transpose(value);                                                  \
        space T* p = target + matrix_row() * elements_per_row + matrix_column();                   \
        if ((unsigned long)p % sizeof(pair) == 0) {                                                \
            *(space pair*)p = value;                                                               \
        } else {                                                                                   \
            p[0] = value[0];                                                                       \
            p[1] = value[1];                                                                       \
        }                                                                                          \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_HEADER T atomic_exchange(volatile space T* object, T x) {                          \
        return __atomic_exchange_n(object, x, __ATOMIC_RELAXED);                                   \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_HEADER T atomic_compare_exchange(volatile space T* object, T expected,             \
                                                 T desired) {                                      \
        __atomic_compare_exchange_n(object, &expected, desired, false, __ATOMIC_RELAXED,           \
                                    __ATOMIC_RELAXED);                                             \
        return expected;                                                                           \
    }                                                                                              \
    template <typename Op, typename T, typename Bits>                                              \
    UMFA_INLINE_HEADER T atomic_fetch(volatile space Bits* object, T x) {                          \
        if constexpr (is_atomic_add<Op>::value) {                                                  \
            return __atomic_fetch_add((volatile space T*)object, x, __ATOMIC_RELAXED);             \
        } else {                                                                                   \
            Bits old = __atomic_load_n(object, __ATOMIC_RELAXED), seen;                            \
            while ((seen = atomic_compare_exchange(                                                \
                        object, old,                                                               \
                        __builtin_bit_cast(Bits, Op::apply(__builtin_bit_cast(T, old), x)))) !=    \
                   old)                                                                            \
                old = seen;                                                                        \
            return __builtin_bit_cast(T, old);                                                     \
        }                                                                                          \
    }

/// Sums are one instruction; the rest are loops over compare-and-exchange.
template <typename Op>
struct is_atomic_add {
    static constexpr bool value = false;
};

UMFA_MEMORY(device)
UMFA_MEMORY(threadgroup)
#undef UMFA_MEMORY

}  // namespace umfa_backend

namespace metal {
struct umfa_atomic_add;
}
template <>
struct umfa_backend::is_atomic_add<metal::umfa_atomic_add> {
    static constexpr bool value = true;
};

// ---- the names that the headers call --------------------------------------------------------------

// What the CPU back end checks in these, compute-sanitizer or nothing does here.
UMFA_INLINE_HEADER void umfa_converge(const void*, unsigned long) {}
UMFA_INLINE_HEADER void umfa_check_max_threads(unsigned long) {}
UMFA_INLINE_HEADER void umfa_check_uniform(unsigned long) {}

UMFA_INLINE_CONVERGENT void umfa_threadgroup_barrier(unsigned) { __syncthreads(); }
/// With no memory to order it only tells Apple's compiler where loads may not move.
UMFA_INLINE_CONVERGENT void umfa_simdgroup_barrier(unsigned flags) {
    if (flags != 0) __nvvm_bar_warp_sync(umfa_backend::everyone);
}

/// `types` holds two bits each for D, A, B and C. It is a constant wherever this is inlined.
UMFA_INLINE_CONVERGENT void umfa_matrix_multiply(void* d, const void* a, const void* b,
                                                 const void* c, unsigned types) {
    using namespace umfa_backend;
    const unsigned d_type = types & 3, a_type = types >> 2 & 3, b_type = types >> 4 & 3;
    float_pair r = widen(c, types >> 6 & 3);
    if (a_type == b_type && a_type != float_type) {
        const unsigned x = *(const unsigned*)a, y = transpose_16bit(*(const unsigned*)b);
        r = a_type == half_type ? multiply_half(x, y, r) : multiply_bfloat(x, y, r);
    } else if (b_type == float_type) {
        r = multiply_float(widen(a, a_type), a_type != float_type, transpose(*(const float_pair*)b),
                           false, r);
    } else {
        const unsigned y = transpose_16bit(*(const unsigned*)b);
        r = multiply_float(widen(a, a_type), a_type != float_type, widen(&y, b_type), true, r);
    }
    narrow(d, r, d_type);
}
