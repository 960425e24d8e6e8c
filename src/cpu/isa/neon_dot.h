// NEON with DotProd: int8 products at four times the rate of float ones. Included after neon_simd.h;
// for quantised attention, whose kernels are still to come.

struct NeonDot : Neon {
    static constexpr int int8_offset = 0;  // SDOT multiplies signed by signed

    static vf dot_int8(vf acc, vf a, vf b) {
        return (vf)vdotq_s32((int32x4_t)acc, (int8x16_t)b, (int8x16_t)a);
    }
    struct Int8Lanes {
        static vf load(const float* p) { return Neon::load(p); }
        // As text: see neon_bf16.cpp.
        template <int Lane>
        static vf fma(vf acc, vf a, vf b) {
            __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(b), "w"(a), "i"(Lane));
            return acc;
        }
    };
    template <class U, int MR, int NV>
    static inline __attribute__((always_inline)) void multiply_add(vf (&acc)[MR][NV],
                                                                   const float* a,
                                                                   const vf (&b)[NV]) {
        by_lane<Int8Lanes>(acc, a, b);
    }
};
