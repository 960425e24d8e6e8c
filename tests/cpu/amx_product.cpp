// Reads A, B and C, tiles of 16 rows of 64 bytes, from stdin, and writes C + A B, until the input ends.
#include <cstdint>
#include <cstdio>

#include "cpu/isa/amx_tiles.h"  // or its double
#if !defined(UMFA_AMX_DOUBLE)
#include <sys/syscall.h>
#include <unistd.h>
#endif

int main() {
#if !defined(UMFA_AMX_DOUBLE)
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;
#endif
    using umfa::cpu::AmxTiles;
    alignas(64) static uint32_t tiles[3][16][16];
    while (std::fread(tiles, sizeof tiles, 1, stdin) == 1) {
        AmxTiles::configure();
        AmxTiles::load<4>(tiles[0], 64);
        AmxTiles::load<5>(tiles[1], 64);
        AmxTiles::load<0>(tiles[2], 64);
        AmxTiles::multiply_add_bf16<0, 4, 5>();
        AmxTiles::store<0>(tiles[2], 64);
        AmxTiles::release();
        std::fwrite(tiles[2], sizeof tiles[2], 1, stdout);
    }
}
