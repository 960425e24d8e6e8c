// The micro-kernel on int8: `int8_product shape` writes its height, its lanes and the offset of b;
// `int8_product DEPTH < panels > sums` multiplies, DEPTH units deep, a's panel and then b's.
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
using Simd = NeonDot;
#endif

#include "cpu/isa/product.h"
#include "cpu/isa/units.h"

using Units = Int8Units<Simd>;
constexpr int lanes = Simd::nv * Simd::W;

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    if (!std::strcmp(argv[1], "shape")) {
        std::printf("%d %d %d\n", Simd::mr, lanes, Units::b_offset);
        return 0;
    }
    const size_t depth = std::strtoul(argv[1], nullptr, 10);
    std::vector<float> a(depth * Simd::mr), b(depth * lanes), sums(Simd::mr * lanes);
    if (std::fread(a.data(), 4, a.size(), stdin) != a.size() ||
        std::fread(b.data(), 4, b.size(), stdin) != b.size())
        return 3;
    micro_kernel<Simd, Units, Simd::mr>(
        a.data(), Simd::mr, b.data(), static_cast<int64_t>(depth),
        [&](Simd::vf(&acc)[Simd::mr][Simd::nv]) __attribute__((always_inline)) {
            for (int m = 0; m < Simd::mr; ++m)
                for (int n = 0; n < Simd::nv; ++n)
                    Simd::store(&sums[(m * Simd::nv + n) * Simd::W], acc[m][n]);
        });
    std::fwrite(sums.data(), 4, sums.size(), stdout);
    return 0;
}
