#include "cpu/features.h"

#include <algorithm>
#include <cerrno>
#include <thread>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace umfa::cpu {
namespace {

#if defined(__x86_64__)

std::vector<std::string> detect() {
    std::vector<std::string> found;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1, avx = c >> 28 & 1;
    unsigned state = 0, state_high = 0;
    // What the OS saves on a context switch counts, not only what the CPU has.
    if (c >> 27 & 1) __asm__("xgetbv" : "=a"(state), "=d"(state_high) : "c"(0));
    const bool ymm = (state & 0x6) == 0x6, zmm = ymm && (state & 0xe0) == 0xe0;
    const bool tiles = (state & 0x60000) == 0x60000;
    unsigned b7 = 0, c7 = 0, d7 = 0, a71 = 0, unused = 0;
    __get_cpuid_count(7, 0, &a, &b7, &c7, &d7);
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
    const auto add = [&](bool here, const char* name) {
        if (here) found.emplace_back(name);
    };
    add(ymm && avx, "avx");
    add(ymm && fma, "fma");
    add(ymm && f16c, "f16c");
    add(ymm && (b7 >> 5 & 1), "avx2");
    add(ymm && (a71 >> 4 & 1), "avx_vnni");
    add(zmm && (b7 >> 16 & 1), "avx512f");
    add(zmm && (b7 >> 17 & 1), "avx512dq");
    add(zmm && (b7 >> 30 & 1), "avx512bw");
    add(zmm && (b7 >> 31 & 1), "avx512vl");
    add(zmm && (c7 >> 11 & 1), "avx512_vnni");
    add(zmm && (a71 >> 5 & 1), "avx512_bf16");
    add(zmm && (d7 >> 23 & 1), "avx512_fp16");
    add(tiles && (d7 >> 24 & 1), "amx_tile");
    add(tiles && (d7 >> 22 & 1), "amx_bf16");
    add(tiles && (d7 >> 25 & 1), "amx_int8");
    return found;
}

#elif defined(__aarch64__)

std::vector<std::string> detect() {
    std::vector<std::string> found{"neon"};
    const auto add = [&](bool here, const char* name) {
        if (here) found.emplace_back(name);
    };
#if defined(__APPLE__)
    const auto flag = [](const char* key) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    add(flag("hw.optional.arm.FEAT_FP16"), "fp16");
    add(flag("hw.optional.arm.FEAT_DotProd"), "dotprod");
    add(flag("hw.optional.arm.FEAT_I8MM"), "i8mm");
    add(flag("hw.optional.arm.FEAT_BF16"), "bf16");
    add(flag("hw.optional.arm.FEAT_SME"), "sme");
#elif defined(__linux__)
    const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
    add(one >> 10 & 1, "fp16");
    add(one >> 20 & 1, "dotprod");
    add(two >> 13 & 1, "i8mm");
    add(two >> 14 & 1, "bf16");
    add(two >> 23 & 1, "sme");
#endif
    return found;
}

#else

std::vector<std::string> detect() { return {}; }

#endif

}  // namespace

const std::vector<std::string>& features() {
    static const std::vector<std::string> found = detect();
    return found;
}

bool has_feature(const char* name) {
    return std::find(features().begin(), features().end(), name) != features().end();
}

int request_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    // Documentation/arch/x86/xstate.rst of Linux: an interrupted thread has these 8 KiB on its stack,
    // so a process gets them on request, and not while an alternate signal stack is too small for them.
    constexpr int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    static const int refusal =
        syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0 ? 0 : errno;
    return refusal;
#else
    return ENOSYS;
#endif
}

int usable_cpus() {
#if defined(__APPLE__)
    // Efficiency cores are several times slower: an even share of the work there is the last to
    // finish.
    int count = 0;
    size_t size = sizeof count;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &count, &size, nullptr, 0) == 0 && count > 0)
        return count;
#elif defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace umfa::cpu
