// The micro-kernel on the 2x2 matrix products of I8MM and BF16, which do twice the products of SDOT
// and BFDOT per instruction. Included after neon_simd.h; without a user until panels can hold units
// of 8 bytes: E = 8 int8, or E = 4 bfloat16.
//
// 24 of 33 instructions in the loop; what that is worth depends on the core, and none was measured.

struct Smmla {
    static constexpr int E = 8;
    static Neon::vf multiply_add(Neon::vf acc, Neon::vf a, Neon::vf b) {
        __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
        return acc;
    }
};

/// Subnormal numbers count as 0, as with BFDOT.
struct Bfmmla {
    static constexpr int E = 4;
    static Neon::vf multiply_add(Neon::vf acc, Neon::vf a, Neon::vf b) {
        __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
        return acc;
    }
};

/// tile[m] += a's pairs of rows times b's pairs of lanes, for m from Row on.
template <class M, int Row = 0, int Rows, int Pairs>
inline __attribute__((always_inline)) void add_pairs(Neon::vf (&tile)[Rows][Pairs], const float* a,
                                                     const Neon::vf (&b)[Pairs]) {
    const Neon::vf pair = Neon::load(a + Row * Neon::W);
    for (int n = 0; n < Pairs; ++n) tile[Row][n] = M::multiply_add(tile[Row][n], pair, b[n]);
    if constexpr (Row + 1 < Rows) add_pairs<M, Row + 1>(tile, a, b);
}

/// c[m][lanes] = sum_k a[k][m] * b[k][lanes], as micro_kernel, with `a` of MR and `b` of 8 units a
/// step. An accumulator holds rows m, m + 1 of two lanes; they are put in order once, at the end.
template <class M, int MR, class Done>
inline __attribute__((always_inline)) void matrix_micro_kernel(const float* a, int64_t a_step,
                                                               const float* b, int64_t depth,
                                                               Done&& done) {
    using vf = Neon::vf;
    constexpr int NV = Neon::nv, W = Neon::W, pairs = NV * W / 2;
    vf tile[MR / 2][pairs];
    for (int m = 0; m < MR / 2; ++m)
        for (int n = 0; n < pairs; ++n) tile[m][n] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vf bk[pairs];
        for (int n = 0; n < pairs; ++n) bk[n] = Neon::load(b + n * W);
        add_pairs<M>(tile, a, bk);
        a += a_step;
        b += pairs * W;
    }
    vf acc[MR][NV];
    for (int m = 0; m < MR / 2; ++m)
        for (int n = 0; n < NV; ++n) {
            const vf left = tile[m][2 * n], right = tile[m][2 * n + 1];
            acc[2 * m][n] = __builtin_shufflevector(left, right, 0, 1, 4, 5);
            acc[2 * m + 1][n] = __builtin_shufflevector(left, right, 2, 3, 6, 7);
        }
    done(acc);
}
