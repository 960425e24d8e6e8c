// Micro-kernels that no attention kernel uses yet, alone. PRODUCT is DOT (int8), SMMLA or BFMMLA.
//
// `unit_product shape` writes height, lanes, bytes of a unit and the offset of b;
// `unit_product DEPTH < panels > sums` multiplies, DEPTH units deep, a's panel and then b's.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/isa/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace {

#if defined(__x86_64__)
constexpr int vector_lanes = 16;
#include "cpu/isa/simd.h"

#include "cpu/isa/avx512_simd.h"

#include "cpu/isa/avx512_vnni.h"
using Simd = Avx512Vnni;
#else
constexpr int vector_lanes = 4;
#include "cpu/isa/simd.h"

#include "cpu/isa/neon_simd.h"

#include "cpu/isa/neon_dot.h"
#include "cpu/isa/neon_mmla.h"
using Simd = NeonDot;
#endif

#include "cpu/isa/product.h"
#include "cpu/isa/units.h"

constexpr int mr = Simd::mr, lanes = Simd::nv * Simd::W;

enum Product { DOT, SMMLA, BFMMLA };
constexpr int unit_floats = PRODUCT == DOT ? 1 : 2;
constexpr int b_offset = PRODUCT == DOT ? Int8Units<Simd>::b_offset : 0;

template <class Done>
void multiply(const float* a, const float* b, int64_t depth, Done done) {
    constexpr int64_t step = mr * unit_floats;
    if constexpr (PRODUCT == DOT) micro_kernel<Simd, Int8Units<Simd>, mr>(a, step, b, depth, done);
#if defined(__aarch64__)
    if constexpr (PRODUCT == SMMLA) matrix_micro_kernel<Smmla, mr>(a, step, b, depth, done);
    if constexpr (PRODUCT == BFMMLA) matrix_micro_kernel<Bfmmla, mr>(a, step, b, depth, done);
#endif
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    if (!std::strcmp(argv[1], "shape")) {
        std::printf("%d %d %d %d\n", mr, lanes, 4 * unit_floats, b_offset);
        return 0;
    }
    const size_t depth = std::strtoul(argv[1], nullptr, 10), step = depth * unit_floats;
    std::vector<float> a(step * mr), b(step * lanes), sums(mr * lanes);
    if (std::fread(a.data(), 4, a.size(), stdin) != a.size() ||
        std::fread(b.data(), 4, b.size(), stdin) != b.size())
        return 3;
    const auto keep = [&](Simd::vf(&acc)[mr][Simd::nv]) __attribute__((always_inline)) {
        for (int m = 0; m < mr; ++m)
            for (int n = 0; n < Simd::nv; ++n)
                Simd::store(&sums[(m * Simd::nv + n) * Simd::W], acc[m][n]);
    };
    multiply(a.data(), b.data(), static_cast<int64_t>(depth), keep);
    std::fwrite(sums.data(), 4, sums.size(), stdout);
    return 0;
}
