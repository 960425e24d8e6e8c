// AMX: bfloat16 products by matrix registers, at fifteen times the rate of float ones. The rest is
// avx512.cpp's.
#define UMFA_VECTOR_LANES 16
#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/avx512_bf16_simd.h"
#include "cpu/isa/dtype_kernels.h"
#include "cpu/isa/tile_kernel.h"

namespace umfa::cpu {
namespace {

struct Simd : Avx512Bf16 {
    using Tiles = AmxTiles;
    static constexpr int mr = 32;  // two tiles of keys or channels
};

template <class U>
void amx_forward(const ForwardArgs& args, const Block& block, const Block* next, float* scratch) {
    AmxTiles::configure();
    forward_tiles<Simd, U>(args, block, next, scratch);
    AmxTiles::release();
}

// The products take so little time that packing counts for more: 18 % from 256 to 1024 rows, D=128. Every
// CPU with AMX has an L2 cache of 2 MiB.
constexpr int64_t amx_block_rows = 1024, amx_block_floats = 256 * 1024;

template <class U>
constexpr ForwardKernel amx_kernel{amx_forward<U>, forward_scratch_floats<Simd, U>, amx_block_rows,
                                   amx_block_floats};

using Int8Tiles = Int8Scores<TileUnits<Simd>, Int8Units<Simd, false>>;

// vdpbf16ps is slower than float multiplications on the CPUs that have AMX.
using Decode = FloatUnits<Simd, BF16>;

}  // namespace

constinit const Kernels amx_bf16_kernels{
    "amx_bf16",
    &avx512_kernels,
    Simd::nv * Simd::W,
    {},
    {},
    {amx_kernel<TileUnits<Simd>>,
     {decode_keys<Simd, Decode>, decode_merge<Simd, Decode>, decode_scratch_floats<Simd, Decode>,
      decode_row_floats<Simd>},
     append_row<Simd, BF16>,
     {combine_add<Simd, BF16>, combine_store<Simd, BF16>}},
    {},
    {},
    {},
    {},
    {{}, {}, {amx_kernel<Int8Tiles>, {}, key_means<Simd, TileUnits<Simd>>}, {}},
};

}  // namespace umfa::cpu
