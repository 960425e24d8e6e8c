// The matrix registers of AMX, "tiles": eight of 16 rows of 64 bytes each.
//
// As inline assembly: the intrinsics do not tell GCC 12 that a tile load reads memory, so that it may
// move a store behind it.
#pragma once

#include <stdint.h>

namespace umfa::cpu {
namespace {

struct AmxTiles {
    /// Makes all eight tiles whole. Until release(), what runs on this thread is slower to switch.
    static void configure() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        static_assert(sizeof config == 64);
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    static void release() { __asm__ volatile("tilerelease" : : : "memory"); }

    template <int Tile>
    static void zero() {
        __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
    }
    /// Rows of 64 bytes, `pitch` bytes apart.
    template <int Tile>
    static void load(const void* from, int64_t pitch) {
        __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                         :
                         : "i"(Tile), "r"(from), "r"(pitch)
                         : "memory");
    }
    template <int Tile>
    static void store(void* to, int64_t pitch) {
        __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                         :
                         : "i"(Tile), "r"(to), "r"(pitch)
                         : "memory");
    }
    /// C[m][n] += the sum over k of a[m][k].low * b[k][n].low, plus that of the upper halves: two
    /// chains of fused multiply-adds in float32 that begin at 0, without subnormal numbers.
    template <int C, int A, int B>
    static void multiply_add_bf16() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
    /// C[m][n] += the sum over k of the four products of signed bytes of a[m][k] and b[k][n].
    template <int C, int A, int B>
    static void multiply_add_int8() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};

}  // namespace
}  // namespace umfa::cpu
