// Replaces src/cpu/isa/amx_tiles.h where UMFA_AMX is DOUBLE: the tile instructions in plain C++, with the
// same results to the last bit, so that the kernels for AMX run on a CPU without it.
//
// What an instruction would refuse is refused here: tiles used before they are configured, or after they
// were released.
#pragma once

#include <stdint.h>
#include <xmmintrin.h>

namespace umfa::cpu {
namespace {

struct AmxTiles {
    static void configure() {
        state.configured = true;
        for (Tile& tile : state.tiles) tile = {};
    }
    static void release() { state.configured = false; }

    template <int Index>
    static void zero() {
        tile(Index) = {};
    }
    template <int Index>
    static void load(const void* from, int64_t pitch) {
        for (int row = 0; row < rows; ++row)
            __builtin_memcpy(tile(Index).units[row], static_cast<const char*>(from) + row * pitch,
                             row_bytes);
    }
    template <int Index>
    static void store(void* to, int64_t pitch) {
        for (int row = 0; row < rows; ++row)
            __builtin_memcpy(static_cast<char*>(to) + row * pitch, tile(Index).units[row],
                             row_bytes);
    }
    template <int C, int A, int B>
    static void multiply_add_bf16() {
        // As TDPBF16PS, whatever the mode of the thread: to nearest, subnormal numbers are 0.
        const unsigned mode = _mm_getcsr();
        set_mode(0x9fc0);
        for (int m = 0; m < rows; ++m) add_row(tile(C).units[m], tile(A).units[m], tile(B));
        set_mode(mode);
    }
    template <int C, int A, int B>
    static void multiply_add_int8() {
        for (int m = 0; m < rows; ++m)
            for (int k = 0; k < rows; ++k)
                for (int n = 0; n < 16; ++n)
                    tile(C).units[m][n] += product(tile(A).units[m][k], tile(B).units[k][n]);
    }

private:
    static constexpr int rows = 16, row_bytes = 64;
    struct alignas(64) Tile {
        uint32_t units[rows][16];
    };
    struct State {
        Tile tiles[8];
        bool configured;
    };
    static inline thread_local State state;

    static Tile& tile(int index) {
        if (!state.configured) __builtin_trap();
        return state.tiles[index];
    }
    static void set_mode(unsigned mode) { __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
    /// Of the four signed bytes of each.
    static uint32_t product(uint32_t a, uint32_t b) {
        int32_t sum = 0;
        for (int shift = 0; shift < 32; shift += 8)
            sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
        return static_cast<uint32_t>(sum);
    }
    static float as_float(uint32_t bits) {
        float x;
        __builtin_memcpy(&x, &bits, sizeof x);
        return x;
    }
    static void add_row(uint32_t* c, const uint32_t* a, const Tile& b) {
        float low[16] = {}, high[16] = {};
        for (int k = 0; k < rows; ++k)
            for (int n = 0; n < 16; ++n) {
                const uint32_t pair = b.units[k][n];
                low[n] = __builtin_fmaf(as_float(a[k] << 16), as_float(pair << 16), low[n]);
                high[n] = __builtin_fmaf(as_float(a[k] & 0xffff0000u), as_float(pair & 0xffff0000u),
                                         high[n]);
            }
        for (int n = 0; n < 16; ++n) {
            const float sum = as_float(c[n]) + (low[n] + high[n]);
            __builtin_memcpy(c + n, &sum, sizeof sum);
        }
    }
};

}  // namespace
}  // namespace umfa::cpu
