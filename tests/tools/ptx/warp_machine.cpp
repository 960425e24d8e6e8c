// NVIDIA's warp-wide instructions on the fibers of the emulator, as the PTX ISA describes them: so
// that the code the PTX back end generates can be run, up to LLVM's own code generator, without a
// GPU. Fragments: "Matrix Fragments for mma.m16n8k8" and "...m16n8k16", and movmatrix, in PTX ISA
// 8.3.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../../../tools/metal/emulator/runtime/interface.h"

extern "C" {
void umfa_rendezvous(void* slot, umfa_combine combine, unsigned kind);
void umfa_threadgroup_barrier(unsigned flags);
void umfa_simdgroup_barrier(unsigned flags);
unsigned umfa_launch_value(unsigned what, unsigned axis);

__attribute__((visibility("hidden"))) alignas(16) char umfa_dynamic_memory[32768];
}

namespace {

template <typename T>
T& of(umfa_lane_slots* slots, unsigned lane) {
    return *static_cast<T*>(slots->slot[lane]);
}
unsigned group(unsigned lane) { return lane / 4; }
unsigned in_group(unsigned lane) { return lane % 4; }

// ---- shuffles ------------------------------------------------------------------------------------

struct Shuffled {
    uint32_t value, from, result;
};
void shuffle(umfa_lane_slots* slots) {
    for (unsigned n = 0; n < 32; n++) {
        if (!(slots->active >> n & 1)) continue;
        Shuffled& s = of<Shuffled>(slots, n);
        const bool there = slots->active >> (s.from & 31) & 1;
        s.result = there ? of<Shuffled>(slots, s.from & 31).value : 0xdeadbeef;
    }
}

struct Reduced {
    uint32_t value, result;
};
void mask_of_active(umfa_lane_slots* slots) {
    for (unsigned n = 0; n < 32; n++)
        if (slots->active >> n & 1) of<Reduced>(slots, n).result = slots->active;
}
void smallest(umfa_lane_slots* slots) {
    uint32_t least = ~0U;
    for (unsigned n = 0; n < 32; n++) {
        if (!(slots->active >> n & 1)) continue;
        const uint32_t value = of<Reduced>(slots, n).value;
        if (value < least) least = value;
    }
    for (unsigned n = 0; n < 32; n++)
        if (slots->active >> n & 1) of<Reduced>(slots, n).result = least;
}

// ---- matrices ------------------------------------------------------------------------------------

struct Moved {
    uint16_t in[2], out[2];
};
void transpose(umfa_lane_slots* slots) {
    uint16_t matrix[8][8];
    for (unsigned n = 0; n < 32; n++)
        for (unsigned i = 0; i < 2; i++)
            matrix[group(n)][2 * in_group(n) + i] = of<Moved>(slots, n).in[i];
    for (unsigned n = 0; n < 32; n++)
        for (unsigned i = 0; i < 2; i++)
            of<Moved>(slots, n).out[i] = matrix[2 * in_group(n) + i][group(n)];
}

struct Loaded {
    const char* row;  // that this lane points to
    uint16_t out[4][2];
};
/// Lane n points to row n % 8 of matrix n / 8.
template <unsigned count, bool transposed>
void load_matrices(umfa_lane_slots* slots) {
    uint16_t matrix[8][8];
    for (unsigned m = 0; m < count; m++) {
        for (unsigned r = 0; r < 8; r++) memcpy(matrix[r], of<Loaded>(slots, 8 * m + r).row, 16);
        for (unsigned n = 0; n < 32; n++) {
            for (unsigned i = 0; i < 2; i++) {
                const unsigned a = group(n), b = 2 * in_group(n) + i;
                of<Loaded>(slots, n).out[m][i] = transposed ? matrix[b][a] : matrix[a][b];
            }
        }
    }
}
template <unsigned count, bool transposed>
__m128i load(const char* row) {
    Loaded m{row, {}};
    umfa_rendezvous(&m, load_matrices<count, transposed>, 1);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(m.out));
}

enum Type { f16, bf16, tf32 };

struct Product {
    uint32_t a[4], b[2];
    float c[4], d[4];
};
float number(uint32_t word, unsigned i, Type type) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    if (type == f16) {
        _Float16 h;
        memcpy(&h, &bits, 2);
        return static_cast<float>(h);
    }
    // bfloat16 is the upper half of a float; tf32 is a float whose last 13 bits are ignored.
    const uint32_t wide = type == bf16 ? static_cast<uint32_t>(bits) << 16 : word & ~0x1fffU;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}
template <Type type, unsigned depth>
void multiply(umfa_lane_slots* slots) {
    float a[16][16], b[16][8];
    for (unsigned n = 0; n < 32; n++) {
        const Product& p = of<Product>(slots, n);
        const unsigned g = group(n), t = in_group(n);
        if (type == tf32) {
            a[g][t] = number(p.a[0], 0, type);
            a[g + 8][t] = number(p.a[1], 0, type);
            a[g][t + 4] = number(p.a[2], 0, type);
            a[g + 8][t + 4] = number(p.a[3], 0, type);
            b[t][g] = number(p.b[0], 0, type);
            b[t + 4][g] = number(p.b[1], 0, type);
            continue;
        }
        for (unsigned i = 0; i < 2; i++) {
            for (unsigned k = 0; k < depth / 8; k++) {
                a[g][8 * k + 2 * t + i] = number(p.a[2 * k], i, type);
                a[g + 8][8 * k + 2 * t + i] = number(p.a[2 * k + 1], i, type);
                b[8 * k + 2 * t + i][g] = number(p.b[k], i, type);
            }
        }
    }
    for (unsigned n = 0; n < 32; n++) {
        Product& p = of<Product>(slots, n);
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = group(n) + 8 * (i / 2), column = 2 * in_group(n) + i % 2;
            float sum = p.c[i];
            for (unsigned k = 0; k < depth; k++) sum += a[row][k] * b[k][column];
            p.d[i] = sum;
        }
    }
}
template <Type type, unsigned depth>
__m128 product(Product p) {
    umfa_rendezvous(&p, multiply<type, depth>, 1);
    return _mm_loadu_ps(p.d);
}
const float unset = __builtin_nanf("");  // must reach nothing

}  // namespace

extern "C" {

uint32_t nv_shfl_sync_bfly_i32(uint32_t, uint32_t value, uint32_t mask, uint32_t) {
    Shuffled s{value, (umfa_self->lane ^ mask) & 31, 0};
    umfa_rendezvous(&s, shuffle, 0);
    return s.result;
}
uint32_t nv_shfl_sync_idx_i32(uint32_t, uint32_t value, uint32_t from, uint32_t) {
    Shuffled s{value, from & 31, 0};
    umfa_rendezvous(&s, shuffle, 0);
    return s.result;
}
uint32_t nv_activemask() {
    Reduced r{};
    umfa_rendezvous(&r, mask_of_active, 0);
    return r.result;
}
uint32_t nv_redux_min(uint32_t value, uint32_t) {
    Reduced r{value, 0};
    umfa_rendezvous(&r, smallest, 0);
    return r.result;
}
void nv_barrier(uint32_t) { umfa_threadgroup_barrier(3); }
void nv_warp_barrier(uint32_t) { umfa_simdgroup_barrier(3); }

uint32_t nv_movmatrix(uint32_t x) {
    Moved m;
    memcpy(m.in, &x, 4);
    umfa_rendezvous(&m, transpose, 1);
    memcpy(&x, m.out, 4);
    return x;
}
uint32_t nv_ldmatrix_x1(const char* row) {
    return static_cast<uint32_t>(_mm_cvtsi128_si32(load<1, false>(row)));
}
uint32_t nv_ldmatrix_x1_trans(const char* row) {
    return static_cast<uint32_t>(_mm_cvtsi128_si32(load<1, true>(row)));
}
__m128i nv_ldmatrix_x4(const char* row) { return load<4, false>(row); }
__m128i nv_ldmatrix_x4_trans(const char* row) { return load<4, true>(row); }

// One for each shape of operands that the back end writes: k, and whether both halves of rows count.
#define UMFA_PRODUCTS(type)                                                                        \
    __m128 nv_mma_k8_half_##type(uint32_t a0, uint32_t a1, uint32_t b, float c0, float c1) {       \
        return product<type, 8>({{a0, a1}, {b}, {c0, c1, unset, unset}, {}});                      \
    }                                                                                              \
    __m128 nv_mma_k8_full_##type(uint32_t a0, uint32_t a1, uint32_t b, float c0, float c1,         \
                                 float c2, float c3) {                                             \
        return product<type, 8>({{a0, a1}, {b}, {c0, c1, c2, c3}, {}});                            \
    }                                                                                              \
    __m128 nv_mma_k16_half_##type(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                  uint32_t b1, float c0, float c1) {                               \
        return product<type, 16>({{a0, a1, a2, a3}, {b0, b1}, {c0, c1, unset, unset}, {}});        \
    }                                                                                              \
    __m128 nv_mma_k16_full_##type(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                  uint32_t b1, float c0, float c1, float c2, float c3) {           \
        return product<type, 16>({{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}, {}});              \
    }
UMFA_PRODUCTS(f16)
UMFA_PRODUCTS(bf16)
__m128 nv_mma_k8_half_tf32(uint32_t a0, uint32_t a2, uint32_t zero, uint32_t b0, uint32_t b1,
                           float c0, float c1, float) {
    return product<tf32, 8>({{a0, zero, a2, zero}, {b0, b1}, {c0, c1, unset, unset}, {}});
}
float nv_cvt_tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & ~0x1fffU;
    memcpy(&x, &bits, 4);
    return x;
}

float nv_ex2(float x) { return __builtin_exp2f(x); }
float nv_lg2(float x) { return __builtin_log2f(x); }
float nv_sin(float x) { return __builtin_sinf(x); }
float nv_cos(float x) { return __builtin_cosf(x); }
float nv_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

uint32_t nv_read_ptx_sreg_tid_x() { return umfa_launch_value(6, 0); }
uint32_t nv_read_ptx_sreg_ctaid_x() { return umfa_launch_value(1, 0); }
uint32_t nv_read_ptx_sreg_ctaid_y() { return umfa_launch_value(1, 1); }
uint32_t nv_read_ptx_sreg_ctaid_z() { return umfa_launch_value(1, 2); }
uint32_t nv_read_ptx_sreg_nctaid_x() { return umfa_launch_value(2, 0); }
uint32_t nv_read_ptx_sreg_nctaid_y() { return umfa_launch_value(2, 1); }
uint32_t nv_read_ptx_sreg_nctaid_z() { return umfa_launch_value(2, 2); }

// ---- the launch ----------------------------------------------------------------------------------

constexpr unsigned kArguments = 32;
uint64_t machine_arguments[kArguments];
void* machine_kernel;

void machine_entry() {
    typedef uint64_t u;
    typedef void kernel(u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u, u,
                        u, u, u, u, u, u, u);
    const u* a = machine_arguments;
    reinterpret_cast<kernel*>(machine_kernel)(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
        a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26],
        a[27], a[28], a[29], a[30], a[31]);
}
}
