// Reads float32 bit patterns from stdin, writes what the kernels' vector functions make of them.
// Usage: kernel_math exp2|tanh|load_f16|load_bf16|store_f16|store_bf16 < in > out
// (16-bit formats travel in the low half of each 32-bit word.)
//
//        kernel_math drop_panel|drop_keys < in > out
// drops probabilities with the constants below: of queries from 5 on and keys from 96 on, 48 keys
// [key][query] or 32 keys of one query, of one head after the other. "lanes" says how many queries.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include KERNEL_FILE  // src/cpu/isa/<set>.cpp: its anonymous namespace is visible from here on

namespace umfa::cpu {

static int drop(const char* name) {
    const Dropout dropout{{0xa4093822u, 0x299f31d0u}, 0x60000000u, 1, 3, 2};  // batch 3 + 2 * 4
    const bool panel = !std::strcmp(name, "drop_panel");
    constexpr int N = Simd::nv * Simd::W;
    std::vector<float> tile(panel ? 48 * N : decode_tile);
    for (int head = 0; std::fread(tile.data(), 4, tile.size(), stdin) == tile.size(); ++head) {
        if (panel)
            drop_panel<Simd, FloatUnits<Simd, F32>>(dropout, 4, head, 5, 96, 0, 48, tile.data());
        else
            drop_keys<Simd>(dropout, 4, head, 5, 96, decode_tile, tile.data());
        std::fwrite(tile.data(), 4, tile.size(), stdout);
    }
    return 0;
}

static int run(const char* name) {
    if (!std::strncmp(name, "drop", 4)) return drop(name);
    if (!std::strcmp(name, "lanes")) {
        const uint32_t lanes = Simd::nv * Simd::W;
        return std::fwrite(&lanes, 4, 1, stdout) != 1;
    }
    constexpr int W = Simd::W;
    std::vector<uint32_t> words(1 << 16);
    size_t count;
    while ((count = std::fread(words.data(), 4, words.size(), stdin)) > 0) {
        for (size_t i = 0; i < count; i += W) {
            float wide[W];
            uint16_t half[W];
            std::memcpy(wide, &words[i], sizeof wide);
            for (int j = 0; j < W; ++j) half[j] = static_cast<uint16_t>(words[i + j]);
            const Simd::vf x = Simd::load(wide);
            bool narrow = false;
            if (!std::strcmp(name, "exp2"))
                Simd::store(wide, Lanes<Simd>::exp2(x));
            else if (!std::strcmp(name, "tanh"))
                Simd::store(wide, Lanes<Simd>::tanh(x));
            else if (!std::strcmp(name, "load_f16"))
                Simd::store(wide, Simd::load_f16(half));
            else if (!std::strcmp(name, "load_bf16"))
                Simd::store(wide, Simd::load_bf16(half));
            else if (narrow = true; !std::strcmp(name, "store_f16"))
                Simd::store_f16(half, x);
            else if (!std::strcmp(name, "store_bf16"))
                Simd::store_bf16(half, x);
            else
                return 2;
            std::memcpy(&words[i], wide, sizeof wide);
            for (int j = 0; narrow && j < W; ++j) words[i + j] = half[j];
        }
        std::fwrite(words.data(), 4, count, stdout);
    }
    return 0;
}

}  // namespace umfa::cpu

int main(int argc, char** argv) { return argc == 2 ? umfa::cpu::run(argv[1]) : 2; }
