#include "core/instruments.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>

#include "core/error.h"
#include "cpu/features.h"
#include "cpu/isa/amx_tiles.h"
#include "cpu/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace umfa::cpu {
namespace {

constexpr int repeats = 5;                   // the fastest counts: other processes may run
constexpr double seconds_per_repeat = 0.02;  // long enough for the clock, and for a thread to wake
constexpr int64_t largest = int64_t{1} << 40;  // bytes of a buffer

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// A loop over `count` accumulators that do not depend on each other: more than latency times
// instructions per cycle, and few enough for the registers. A macro, since a lambda or a template
// would not inherit the target of the function that it is used in. The empty asm keeps the compiler
// from knowing what is in the accumulators, and so from computing less.
#define UMFA_PEAK_LOOP(name, target, type, count, constraint, start, step)        \
    target void name(int64_t iterations) {                                        \
        type accs[count];                                                         \
        _Pragma("GCC unroll 32") for (int j = 0; j < count; ++j) accs[j] = start; \
        for (int64_t i = 0; i < iterations; ++i) {                                \
            _Pragma("GCC unroll 32") for (int j = 0; j < count; ++j) {            \
                type acc = accs[j];                                               \
                step;                                                             \
                asm volatile("" : "+" constraint(acc));                           \
                accs[j] = acc;                                                    \
            }                                                                     \
        }                                                                         \
    }

// Four floats: the compiler splits them up where the CPU has no vectors.
typedef float float4 __attribute__((vector_size(16)));
#if defined(__x86_64__)
#define UMFA_VECTOR "x"
#elif defined(__aarch64__)
#define UMFA_VECTOR "w"
#else
#define UMFA_VECTOR "m"
#endif
UMFA_PEAK_LOOP(portable_f32, , float4, 12, UMFA_VECTOR, (float4{1, 1, 1, 1}),
               acc = acc * 0.5f + 1.0f)

#if defined(__x86_64__)

#define UMFA_TARGET(isa) __attribute__((target(isa)))
UMFA_PEAK_LOOP(avx2_f32, UMFA_TARGET("avx2,fma"), __m256, 12, "x", _mm256_set1_ps(1.0f),
               acc = _mm256_fmadd_ps(acc, _mm256_set1_ps(0.5f), _mm256_set1_ps(1.0f)))
UMFA_PEAK_LOOP(avx512_f32, UMFA_TARGET("avx512f"), __m512, 16, "v", _mm512_set1_ps(1.0f),
               acc = _mm512_fmadd_ps(acc, _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f)))
// All operands of these two are 16 bits of 0x3f80, 1.0 in bfloat16, or bytes of it.
UMFA_PEAK_LOOP(avx512_bf16, UMFA_TARGET("avx512f,avx512bw,avx512vl,avx512bf16"), __m512, 16, "v",
               _mm512_set1_ps(1.0f),
               acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi16(0x3f80),
                                      (__m512bh)_mm512_set1_epi16(0x3f80)))
UMFA_PEAK_LOOP(avx512_int8, UMFA_TARGET("avx512f,avx512bw,avx512vnni"), __m512i, 16, "v",
               _mm512_set1_epi32(1),
               acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi16(0x3f80), _mm512_set1_epi16(0x3f80)))

#if defined(UMFA_AMX)
void amx_bf16(int64_t iterations) {
    alignas(64) uint16_t ones[16 * 32];
    std::fill(std::begin(ones), std::end(ones), uint16_t{0x3f80});
    AmxTiles::configure();
    AmxTiles::load<4>(ones, 64);
    AmxTiles::load<5>(ones, 64);
    for (int64_t i = 0; i < iterations; ++i) {
        AmxTiles::multiply_add_bf16<0, 4, 5>();
        AmxTiles::multiply_add_bf16<1, 4, 5>();
        AmxTiles::multiply_add_bf16<2, 4, 5>();
        AmxTiles::multiply_add_bf16<3, 4, 5>();
    }
    AmxTiles::release();
}
#endif

#elif defined(__aarch64__)

// As inline assembly: which of these intrinsics a compiler declares depends on its flags and its
// age.
#define UMFA_NEON_LOOP(name, extension, instruction)              \
    UMFA_PEAK_LOOP(name, , float4, 24, "w", (float4{1, 1, 1, 1}), \
                   asm volatile(extension instruction : "+w"(acc) : "w"(operand)))
constexpr float4 operand = {1, 1, 1, 1};
UMFA_NEON_LOOP(neon_f32, "", "fmla %0.4s, %1.4s, %1.4s")
UMFA_NEON_LOOP(neon_f16, ".arch_extension fp16\n", "fmla %0.8h, %1.8h, %1.8h")
UMFA_NEON_LOOP(neon_bf16, ".arch_extension bf16\n", "bfmmla %0.4s, %1.8h, %1.8h")
UMFA_NEON_LOOP(neon_dotprod, ".arch_extension dotprod\n", "sdot %0.4s, %1.16b, %1.16b")
UMFA_NEON_LOOP(neon_i8mm, ".arch_extension i8mm\n", "smmla %0.4s, %1.16b, %1.16b")

#endif

// Sums up memory, with the widest loads there are.
typedef uint64_t Line __attribute__((vector_size(64)));
#define UMFA_READ_LOOP(name, target)                                      \
    target void name(const Line* begin, const Line* end) {                \
        Line sum = {};                                                    \
        for (const Line* line = begin; line != end; ++line) sum += *line; \
        asm volatile("" : : "m"(sum));                                    \
    }
UMFA_READ_LOOP(read_portable, )
#if defined(__x86_64__)
UMFA_READ_LOOP(read_avx2, UMFA_TARGET("avx2"))
UMFA_READ_LOOP(read_avx512, UMFA_TARGET("avx512f"))
#endif

void (*reader())(const Line*, const Line*) {
#if defined(__x86_64__)
    if (has_feature("avx512f")) return read_avx512;
    if (has_feature("avx2")) return read_avx2;
#endif
    return read_portable;
}

struct Loop {
    const char* dtype;
    const char* isa;
    bool (*usable)();
    void (*run)(int64_t iterations);
    int64_t operations;  // of one iteration: accumulators * lanes * products of a lane * 2
};

// Best first within a dtype.
const Loop loops[] = {
#if defined(__x86_64__)
    {"float32", "avx512", [] { return has_feature("avx512f"); }, avx512_f32, 16 * 16 * 2},
    {"float32", "avx2", [] { return has_feature("avx2") && has_feature("fma"); }, avx2_f32,
     12 * 8 * 2},
#if defined(UMFA_AMX)
    {"bfloat16", "amx_bf16", [] { return has_feature("amx_bf16") && request_tiles() == 0; },
     amx_bf16, 4 * 16 * 16 * 32 * 2},
#endif
    {"bfloat16", "avx512_bf16",
     [] {
         return has_feature("avx512_bf16") && has_feature("avx512bw") && has_feature("avx512vl");
     },
     avx512_bf16, 16 * 16 * 2 * 2},
    {"int8", "avx512_vnni", [] { return has_feature("avx512_vnni") && has_feature("avx512bw"); },
     avx512_int8, 16 * 16 * 4 * 2},
#elif defined(__aarch64__)
    {"float32", "neon", [] { return true; }, neon_f32, 24 * 4 * 2},
    {"float16", "neon_fp16", [] { return has_feature("fp16"); }, neon_f16, 24 * 8 * 2},
    {"bfloat16", "neon_bf16", [] { return has_feature("bf16"); }, neon_bf16, 24 * 4 * 4 * 2},
    {"int8", "neon_i8mm", [] { return has_feature("i8mm"); }, neon_i8mm, 24 * 4 * 8 * 2},
    {"int8", "neon_dotprod", [] { return has_feature("dotprod"); }, neon_dotprod, 24 * 4 * 4 * 2},
#endif
    {"float32", "portable", [] { return true; }, portable_f32, 12 * 4 * 2},
};

/// Whether kernels of the set `isa` could use the loop: its family has it, or the one that AMX's
/// kernels build on.
bool could_use(std::string_view isa, const Loop& loop) {
    const auto family = [](std::string_view name) { return name.substr(0, name.find('_')); };
    const std::string_view own = family(isa), other = family(loop.isa);
    return isa == "auto" || own == other || (own == "amx" && other == "avx512");
}

const Loop& find(const std::string& dtype, const std::string& isa) {
    std::string here;
    bool known = false;
    const Loop* best = nullptr;
    for (const Loop& loop : loops) {
        if (!loop.usable()) continue;
        here += (here.empty() ? "" : ", ") + std::string(loop.dtype) + " " + loop.isa;
        if (dtype != loop.dtype) continue;
        known = true;
        // The set's own name goes before its family: "neon_dotprod" is not "neon_i8mm".
        if (isa == loop.isa) return loop;
        if (!best && could_use(isa, loop)) best = &loop;
    }
    if (best) return *best;
    fail(ErrorKind::unsupported, "umfa.cpu_peak",
         known ? "no loop of this instruction set runs on this CPU"
               : "no loop on this dtype runs on this CPU",
         dtype + " " + isa, "one of " + here);
}

/// Seconds in which every thread has run the loop `iterations` times.
double seconds_of(const Loop& loop, int64_t iterations, int threads) {
    const double start = seconds_now();
    parallel_for(threads, threads, [&](int64_t) { loop.run(iterations); });
    return seconds_now() - start;
}

}  // namespace

#if defined(__x86_64__)
bool bf16_products_pay() {
    // A few microseconds each, by turns. The rates differ by a factor of two or more, one way (AMD) or the
    // other (Intel).
    constexpr int64_t iterations = 1000;
    constexpr int turns = 20;
    static const bool pay = [] {
        double bf16 = 1, f32 = 1;
        for (int i = 0; i < turns; ++i) {
            const double start = seconds_now();
            avx512_bf16(iterations);
            const double then = seconds_now();
            avx512_f32(iterations);
            bf16 = std::min(bf16, then - start);
            f32 = std::min(f32, seconds_now() - then);
        }
        return bf16 < 2 * f32;  // it multiplies twice as many numbers
    }();
    return pay;
}
#endif

std::vector<std::pair<std::string, std::string>> peaks() {
    std::vector<std::pair<std::string, std::string>> list;
    for (const Loop& loop : loops)
        if (loop.usable()) list.emplace_back(loop.dtype, loop.isa);
    return list;
}

double peak(const std::string& dtype, const std::string& isa) {
    const Loop& loop = find(dtype, isa);
    const int threads = num_threads();
    // This also brings the clock to its speed under load.
    int64_t iterations = 1 << 10;
    double seconds = seconds_of(loop, iterations, threads);
    while (seconds < seconds_per_repeat) {
        iterations *= 2;
        seconds = seconds_of(loop, iterations, threads);
    }
    for (int i = 1; i < repeats; ++i)
        seconds = std::min(seconds, seconds_of(loop, iterations, threads));
    return static_cast<double>(loop.operations * iterations * threads) / seconds;
}

double read_bandwidth(int64_t bytes) {
    if (bytes < 1 || bytes > largest)
        fail(ErrorKind::value, "umfa.read_bandwidth", "bytes is out of range",
             std::to_string(bytes), "1 to " + std::to_string(largest));
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    constexpr int64_t line = sizeof(Line);
    const int64_t lines = (bytes + line - 1) / line;
    const std::unique_ptr<void, Free> memory(
        std::aligned_alloc(line, static_cast<size_t>(lines * line)));
    if (!memory) throw std::bad_alloc();
    Line* data = static_cast<Line*>(memory.get());
    // Pieces that are long for the prefetchers, and enough of them that no thread idles at the end.
    const int64_t pieces = std::min<int64_t>(lines, int64_t{16} * num_threads());
    const auto first = [&](int64_t piece) { return data + lines * piece / pieces; };
    // Written first: untouched pages are all one page of zeros, which is in the cache.
    parallel_for(pieces, num_threads(), [&](int64_t piece) {
        std::fill(first(piece), first(piece + 1), Line{} + static_cast<uint64_t>(piece + 1));
    });
    const auto read = reader();
    double seconds = 0;
    for (int i = 0; i < repeats; ++i) {
        const double start = seconds_now();
        parallel_for(pieces, num_threads(),
                     [&](int64_t piece) { read(first(piece), first(piece + 1)); });
        const double taken = seconds_now() - start;
        seconds = i == 0 ? taken : std::min(seconds, taken);
    }
    return static_cast<double>(lines * line) / seconds;
}

}  // namespace umfa::cpu
