// Everything the stand-in Metal headers need from the machine that runs the kernel.
//
// This is the CPU back end: a thread of the GPU is a fiber, and the functions below are calls into
// runtime/. Another back end (tools/metal/ptx) is another file of this name with the same
// functions, found by the order of include folders; the headers know no runtime but through it.
#pragma once
#include "umfa_builtins.h"
#include "umfa_keywords.h"

// A kernel stays a function of its own: the threadgroup variables are found by its name.
#define UMFA_KERNEL __attribute__((noinline))

// convergent and nomerge keep the optimiser from cloning or joining these calls across branches:
// the runtime compares call sites to find divergence.
#define UMFA_CONVERGENT __attribute__((convergent, nomerge))
#define UMFA_INLINE_HEADER inline __attribute__((always_inline))
#define UMFA_INLINE_CONVERGENT inline __attribute__((always_inline, convergent, nomerge))

extern "C" {

/// What a GPU thread can ask about itself without calling the runtime.
struct umfa_thread {
    unsigned lane;
    unsigned simdgroup;
    unsigned row;     // of the two matrix elements this lane holds
    unsigned column;  // of the first of them; the second is in column + 1
};

struct umfa_lane_slots {
    void* slot[32];
    unsigned active;   // bit n: lane n takes part
    unsigned reverse;  // reductions run from the last lane to the first
};

extern umfa_thread* umfa_self;

typedef void (*umfa_combine)(umfa_lane_slots*);

/// All lanes of the simdgroup meet; the last one to arrive runs `combine` over their slots.
UMFA_CONVERGENT void umfa_rendezvous(void* slot, umfa_combine combine, unsigned kind);
/// Does not meet, but what all lanes must do alike is compared when they next meet.
UMFA_CONVERGENT void umfa_converge(const void* pointer, unsigned long stride);
UMFA_CONVERGENT void umfa_matrix_multiply(void* d, const void* a, const void* b, const void* c,
                                          unsigned types);
UMFA_CONVERGENT void umfa_threadgroup_barrier(unsigned flags);
UMFA_CONVERGENT void umfa_simdgroup_barrier(unsigned flags);
void umfa_inactive_lane(unsigned lane);
void umfa_past_edge(int lane);
void umfa_check_max_threads(unsigned long limit);
void umfa_check_uniform(unsigned long value);

void* umfa_buffer(unsigned index, unsigned long element_size, unsigned alignment);
void* umfa_threadgroup_memory(unsigned index);
unsigned umfa_launch_value(unsigned what, unsigned axis);

float umfa_exp(float, unsigned);
float umfa_exp2(float, unsigned);
float umfa_exp10(float, unsigned);
float umfa_log(float, unsigned);
float umfa_log2(float, unsigned);
float umfa_log10(float, unsigned);
float umfa_sin(float, unsigned);
float umfa_cos(float, unsigned);
float umfa_tan(float, unsigned);
float umfa_asin(float, unsigned);
float umfa_acos(float, unsigned);
float umfa_atan(float, unsigned);
float umfa_atan2(float, float, unsigned);
float umfa_sinh(float, unsigned);
float umfa_cosh(float, unsigned);
float umfa_tanh(float, unsigned);
float umfa_asinh(float, unsigned);
float umfa_acosh(float, unsigned);
float umfa_atanh(float, unsigned);
float umfa_pow(float, float, unsigned);
float umfa_rsqrt(float, unsigned);
float umfa_fmod(float, float);
}

namespace umfa_backend {

enum kind : unsigned { any_lanes, all_lanes, barrier, shuffles };

/// The same address, of which the optimiser knows nothing any more: neither how it is aligned, nor
/// that memory is there, which would let it read where the kernel does not.
UMFA_INLINE_HEADER unsigned long hide(unsigned long address) {
    asm("" : "+r"(address));
    return address;
}

UMFA_INLINE_HEADER unsigned lane() { return umfa_self->lane; }
UMFA_INLINE_HEADER unsigned matrix_row() { return umfa_self->row; }
UMFA_INLINE_HEADER unsigned matrix_column() { return umfa_self->column; }

template <typename T>
struct slot {
    T in;
    T out;
    unsigned source;
};

/// combine<T>::run(slots) sees every lane's input and fills every lane's output.
template <typename Combine, typename T>
UMFA_INLINE_CONVERGENT T exchange(T value, unsigned source = 0, unsigned kind = any_lanes) {
    slot<T> s{value, value, source};
    umfa_rendezvous(&s, &Combine::run, kind);
    return s.out;
}

template <typename T>
UMFA_INLINE_HEADER slot<T>& lane_slot(umfa_lane_slots* slots, unsigned lane) {
    return *static_cast<slot<T>*>(slots->slot[lane]);
}

template <typename T>
struct shuffle_lanes {
    static void run(umfa_lane_slots* slots) {
        for (unsigned n = 0; n < 32; n++) {
            if (!(slots->active >> n & 1)) continue;
            slot<T>& s = lane_slot<T>(slots, n);
            if (s.source >= 32 || !(slots->active >> s.source & 1)) {
                umfa_inactive_lane(s.source);
            } else {
                s.out = lane_slot<T>(slots, s.source).in;
            }
        }
    }
};

/// The value that lane `source` passes in.
template <typename T>
UMFA_INLINE_CONVERGENT T shuffle(T value, unsigned source) {
    return exchange<shuffle_lanes<T>>(value, source, shuffles);
}

/// What a shuffle reads that asks for a lane which the group does not have: its own value.
UMFA_INLINE_HEADER unsigned past_edge(int wanted) {
    umfa_past_edge(wanted);
    return lane();
}

template <typename T>
UMFA_INLINE_CONVERGENT T shuffle_xor(T value, unsigned mask) {
    return shuffle(value, lane() ^ mask);
}

template <typename T, typename Op>
struct reduce_lanes {
    static void run(umfa_lane_slots* slots) {
        bool first = true;
        T total{};
        for (unsigned i = 0; i < 32; i++) {
            const unsigned n = slots->reverse ? 31 - i : i;
            if (!(slots->active >> n & 1)) continue;
            const T x = lane_slot<T>(slots, n).in;
            total = first ? x : Op::apply(total, x);
            first = false;
        }
        for (unsigned n = 0; n < 32; n++) {
            if (slots->active >> n & 1) lane_slot<T>(slots, n).out = total;
        }
    }
};

template <typename Op, typename T>
UMFA_INLINE_CONVERGENT T reduce(T value) {
    return exchange<reduce_lanes<T, Op>>(value);
}

template <typename T, typename Op, bool inclusive>
struct scan_lanes {
    static void run(umfa_lane_slots* slots) {
        T total = Op::template identity<T>();
        for (unsigned n = 0; n < 32; n++) {
            if (!(slots->active >> n & 1)) continue;
            slot<T>& s = lane_slot<T>(slots, n);
            const T next = Op::apply(total, s.in);
            s.out = inclusive ? next : total;
            total = next;
        }
    }
};

template <typename Op, bool inclusive, typename T>
UMFA_INLINE_CONVERGENT T scan(T value) {
    return exchange<scan_lanes<T, Op, inclusive>>(value);
}

template <typename T, typename Op>
struct quad_lanes {
    static void run(umfa_lane_slots* slots) {
        for (unsigned base = 0; base < 32; base += 4) {
            bool first = true;
            T total{};
            for (unsigned i = 0; i < 4; i++) {
                const unsigned n = base + (slots->reverse ? 3 - i : i);
                if (!(slots->active >> n & 1)) continue;
                const T x = lane_slot<T>(slots, n).in;
                total = first ? x : Op::apply(total, x);
                first = false;
            }
            for (unsigned i = 0; i < 4; i++)
                if (slots->active >> (base + i) & 1) lane_slot<T>(slots, base + i).out = total;
        }
    }
};
template <typename T, typename Op, bool inclusive>
struct quad_scan_lanes {
    static void run(umfa_lane_slots* slots) {
        T total = Op::template identity<T>();
        for (unsigned n = 0; n < 32; n++) {
            if (n % 4 == 0) total = Op::template identity<T>();
            if (!(slots->active >> n & 1)) continue;
            auto& s = lane_slot<T>(slots, n);
            const T next = Op::apply(total, s.in);
            s.out = inclusive ? next : total;
            total = next;
        }
    }
};
template <typename Op, typename T>
UMFA_INLINE_CONVERGENT T quad_reduce(T value) {
    return exchange<quad_lanes<T, Op>>(value);
}
template <typename Op, bool inclusive, typename T>
UMFA_INLINE_CONVERGENT T quad_scan(T value) {
    return exchange<quad_scan_lanes<T, Op, inclusive>>(value);
}

struct first_lane {
    static void run(umfa_lane_slots* slots) {
        const unsigned first = static_cast<unsigned>(__builtin_ctz(slots->active));
        for (unsigned n = 0; n < 32; n++) {
            if (slots->active >> n & 1) lane_slot<unsigned>(slots, n).out = first;
        }
    }
};

UMFA_INLINE_CONVERGENT unsigned first_active_lane() { return exchange<first_lane>(0U); }

template <typename T>
struct matrix_pair {
    typedef T type __attribute__((ext_vector_type(2)));
    typedef type unaligned __attribute__((aligned(sizeof(T))));
};

// Each lane moves its own two elements, so bounds and races are seen lane by lane. Rows that lie as
// in memory move as one pair, which needs no more alignment than its elements do. A read-modify-
// write is indivisible since fibers give way only at rendezvous; both parts are marked atomic, which
// is how the checks know them.
#define UMFA_MEMORY(space)                                                                         \
    template <typename T>                                                                          \
    UMFA_INLINE_CONVERGENT typename matrix_pair<T>::type matrix_load(                              \
        const space T* source, unsigned long elements_per_row, bool transpose) {                   \
        const unsigned long row = matrix_row(), column = matrix_column();                          \
        if (transpose) {                                                                           \
            const space T* p = source + column * elements_per_row + row;                           \
            return typename matrix_pair<T>::type{p[0], p[elements_per_row]};                       \
        }                                                                                          \
        typedef typename matrix_pair<T>::unaligned pair;                                           \
        return *(const space pair*)(source + row * elements_per_row + column);                     \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_CONVERGENT void matrix_store(typename matrix_pair<T>::type value, space T* target, \
                                             unsigned long elements_per_row, bool transpose) {     \
        const unsigned long row = matrix_row(), column = matrix_column();                          \
        if (transpose) {                                                                           \
            space T* p = target + column * elements_per_row + row;                                 \
            p[0] = value[0];                                                                       \
            p[elements_per_row] = value[1];                                                        \
        } else {                                                                                   \
            typedef typename matrix_pair<T>::unaligned pair;                                       \
            *(space pair*)(target + row * elements_per_row + column) = value;                      \
        }                                                                                          \
    }                                                                                              \
    /* Fenced: else a plain read after it would be optimised away, and its race with it. */        \
    template <typename T>                                                                          \
    UMFA_INLINE_HEADER void atomic_store(volatile space T* object, T x) {                          \
        __atomic_store_n(object, x, __ATOMIC_RELAXED);                                             \
        __atomic_signal_fence(__ATOMIC_SEQ_CST);                                                   \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_HEADER T atomic_exchange(volatile space T* object, T x) {                          \
        const T old = __atomic_load_n(object, __ATOMIC_RELAXED);                                   \
        atomic_store(object, x);                                                                   \
        return old;                                                                                \
    }                                                                                              \
    template <typename T>                                                                          \
    UMFA_INLINE_HEADER T atomic_compare_exchange(volatile space T* object, T expected,             \
                                                 T desired) {                                      \
        const T old = __atomic_load_n(object, __ATOMIC_RELAXED);                                   \
        if (old == expected) atomic_store(object, desired);                                        \
        return old;                                                                                \
    }                                                                                              \
    template <typename Op, typename T, typename Bits>                                              \
    UMFA_INLINE_HEADER T atomic_fetch(volatile space Bits* object, T x) {                          \
        const T old = __builtin_bit_cast(T, __atomic_load_n(object, __ATOMIC_RELAXED));            \
        atomic_store(object, __builtin_bit_cast(Bits, Op::apply(old, x)));                         \
        return old;                                                                                \
    }
UMFA_MEMORY(device)
UMFA_MEMORY(threadgroup)
#undef UMFA_MEMORY

}  // namespace umfa_backend
