// AVX-512 with VNNI: int8 products at four times the rate of float ones. Included after
// avx512_simd.h; for quantised attention, whose kernels are still to come.

struct Avx512Vnni : Avx512 {
    static constexpr int int8_offset = 128;  // VPDPBUSD multiplies unsigned by signed
    static vf dot_int8(vf acc, vf a, vf b) {
        // As text: around the intrinsic, GCC 12 keeps the accumulators of a `vf` array in memory.
        __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
        return acc;
    }
};
