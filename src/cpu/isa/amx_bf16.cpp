// AMX: bfloat16 products by matrix registers, at sixteen times the rate of float ones. The rest is
// avx512.cpp's, and decoding is avx512_bf16.cpp's in all but name.
#define UMFA_VECTOR_LANES 16
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/avx512_bf16_simd.h"
#include "cpu/isa/dtype_kernels.h"

namespace umfa::cpu {
namespace {

struct Simd : Avx512Bf16 {
    using Tiles = AmxTiles;
    static constexpr int mr = 32;  // two tiles of keys or channels
};

void amx_forward(const ForwardArgs& args, const Block& block, const Block* next, float* scratch) {
    AmxTiles::configure();
    forward_block<Simd, TileUnits<Simd>>(args, block, next, scratch);
    AmxTiles::release();
}

constexpr DtypeKernels bf16_kernels() {
    DtypeKernels kernels = dtype_kernels<Avx512Bf16, FloatUnits<Avx512Bf16, BF16>>;
    kernels.forward = {amx_forward, forward_scratch_floats<Simd, TileUnits<Simd>>};
    return kernels;
}

}  // namespace

constinit const Kernels amx_bf16_kernels{
    "amx_bf16", &avx512_kernels, Simd::nv * Simd::W, {}, {}, bf16_kernels(), {}, {},
};

}  // namespace umfa::cpu
