#include "cpu/isa/select.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "cpu/features.h"

namespace umfa::cpu {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*usable)();
    bool (*pays)() = nullptr;  // whether "auto" takes it where it is usable; null: yes
};

#if defined(__x86_64__)
bool avx512() {
    return has_feature("avx512f") && has_feature("avx512bw") && has_feature("avx512dq") &&
           has_feature("avx512vl");
}
// All CPUs with BF16 have VNNI.
bool avx512_bf16() { return avx512() && has_feature("avx512_bf16") && has_feature("avx512_vnni"); }
#if defined(UMFA_AMX_DOUBLE)
bool amx_bf16() { return avx512_bf16(); }
int tiles_refused() { return 0; }
bool amx_pays() { return false; }
#elif defined(UMFA_AMX)
bool amx_bf16() { return avx512_bf16() && has_feature("amx_bf16") && has_feature("amx_int8"); }
int tiles_refused() { return request_tiles(); }
bool amx_pays() { return true; }
#endif
#endif

// Best first; the last one runs anywhere.
const Candidate candidates[] = {
#if defined(__x86_64__)
#if defined(UMFA_AMX)
    {&amx_bf16_kernels, [] { return amx_bf16() && tiles_refused() == 0; }, amx_pays},
#endif
    {&avx512_bf16_kernels, avx512_bf16, bf16_products_pay},
    {&avx512_kernels, avx512},
    {&avx2_kernels,
     [] { return has_feature("avx2") && has_feature("fma") && has_feature("f16c"); }},
#elif defined(__aarch64__)
    {&neon_bf16_kernels, [] { return has_feature("bf16"); }},
    {&neon_kernels, [] { return true; }},
#endif
    {&portable_kernels, [] { return true; }},
};

std::atomic<const Kernels*> selected{nullptr};

const Kernels* find(const std::string& name, const char* spelled) {
    std::string usable_names = "auto";
    for (const Candidate& candidate : candidates) {
        if (!candidate.usable()) continue;
        const bool wished =
            name == "auto" ? !candidate.pays || candidate.pays() : name == candidate.kernels->name;
        if (wished) return candidate.kernels;
        usable_names += std::string(", ") + candidate.kernels->name;
    }
    std::string refusal = " names no instruction set of this CPU";
#if defined(UMFA_AMX)
    if (name == amx_bf16_kernels.name && amx_bf16())
        refusal = std::string(" names an instruction set whose registers the system refuses (") +
                  std::strerror(tiles_refused()) + ")";
#endif
    fail(ErrorKind::value, "umfa", spelled + refusal, "'" + name + "'", "one of " + usable_names);
}

}  // namespace

const Kernels& kernels() {
    const Kernels* now = selected.load(std::memory_order_acquire);
    if (!now) {
        const char* wish = std::getenv("UMFA_CPU_ISA");
        now = find(wish && *wish ? wish : "auto", "UMFA_CPU_ISA");
        selected.store(now, std::memory_order_release);
    }
    return *now;
}

const DtypeKernels& kernels_for(const Kernels& set, DType dtype) {
    const DtypeKernels& own = dtype == DType::f16    ? set.f16
                              : dtype == DType::bf16 ? set.bf16
                                                     : set.f32;
    return own.forward.run ? own : kernels_for(*set.base, dtype);
}

const DtypeKernels& mixed_kernels(const Kernels& set) {
    return set.mixed.forward.run ? set.mixed : mixed_kernels(*set.base);
}

const BackwardKernel& backward_kernel(const Kernels& set, bool bf16) {
    if (bf16 && set.backward_bf16.run) return set.backward_bf16;
    return set.backward.run ? set.backward : backward_kernel(*set.base, bf16);
}

const QuantKernel& quant_kernel(const Kernels& set) {
    return set.quant.encode ? set.quant : quant_kernel(*set.base);
}

const Int8Kernel& int8_kernel(const Kernels& set, std::optional<DType> dtype, bool values) {
#if defined(__x86_64__)
    static const bool vnni = has_feature("avx512_vnni");
    if (vnni && &set == &avx512_kernels) return int8_kernel(avx512_vnni_kernels, dtype, values);
#endif
    const Int8Kernels& all = set.int8;
    const Int8Kernel& own = !dtype                  ? all.mixed
                            : *dtype == DType::f16  ? all.f16
                            : *dtype == DType::bf16 ? all.bf16
                                                    : all.f32;
    if (!(values ? own.values : own.scores).run) return int8_kernel(*set.base, dtype, values);
    return own;
}

std::string isa_in_use() { return kernels().name; }

std::vector<std::pair<std::string, bool>> isa_list() {
    std::vector<std::pair<std::string, bool>> list;
    for (const Candidate& candidate : candidates)
        list.emplace_back(candidate.kernels->name, candidate.usable());
    return list;
}

void set_isa(const std::string& name) {
    selected.store(find(name, "set_cpu_isa"), std::memory_order_release);
}

}  // namespace umfa::cpu
