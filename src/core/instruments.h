// What backends offer besides their operations, to the command line, the benchmarks and the tests.
// Each backend defines its own.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/combine.h"
#include "core/export.h"
#include "core/launch_plan.h"

namespace umfa {
struct Problem;
struct ForwardResults;
struct BackwardProblem;
struct BackwardResults;
struct QuantizeProblem;
struct QuantizeResults;
struct DequantizeProblem;
struct DequantizeResults;
}  // namespace umfa

namespace umfa::cpu {

/// Names of the instruction set extensions that this CPU and OS offer, of those umfa cares about.
UMFA_CORE_API const std::vector<std::string>& features();
/// The instruction set whose kernels run.
UMFA_CORE_API std::string isa_in_use();
/// Every set compiled into this build, best first, and whether this CPU can run it.
UMFA_CORE_API std::vector<std::pair<std::string, bool>> isa_list();
/// Forces a set for the whole process; "auto" undoes it. Throws `Error` if it cannot run here.
UMFA_CORE_API void set_isa(const std::string& name);

/// Threads one call uses: set_num_threads, else UMFA_NUM_THREADS, else OMP_NUM_THREADS, else the
/// usable CPUs. Throws `Error` when the variable is not a positive number.
UMFA_CORE_API int num_threads();
UMFA_CORE_API void set_num_threads(int64_t count);

/// (dtype, instruction set) of every loop for peak() that this CPU can run, the best of each dtype
/// first.
UMFA_CORE_API std::vector<std::pair<std::string, std::string>> peaks();
/// Operations per second of multiply-adds (each counts two) from registers, on operands of `dtype`,
/// over num_threads() threads. `isa` may name a set of kernels: its family decides, so that "avx512"
/// finds the bfloat16 loop of "avx512_bf16", and "amx_bf16" the float32 loop of "avx512"; "auto" takes the
/// best there is.
/// Throws `Error` when this CPU has no such loop.
UMFA_CORE_API double peak(const std::string& dtype, const std::string& isa);
/// Bytes per second that num_threads() threads read from a buffer of so many bytes. It is main
/// memory's only if the buffer is much larger than the caches.
UMFA_CORE_API double read_bandwidth(int64_t bytes);

}  // namespace umfa::cpu

namespace umfa::metal {

/// Text of a file of shaders/ with its own headers put in, ready for newLibraryWithSource; empty for
/// an unknown name. Embedded by the build: nothing is looked for on disk at run time.
UMFA_CORE_API std::string_view shader_text(std::string_view file);
/// "#define NAME VALUE" lines that specialise a launch's shader, to stand in front of its text.
UMFA_CORE_API std::string kernel_defines(const KernelLaunch& launch);
/// The kernel families of a launch, which the self-test excludes as a whole: that of its name, then
/// those of constants that add arithmetic or addressing. "forward_f16_d80_v80_k32" with rotary angles
/// has "forward_f16_d128" and "rotary_f16".
UMFA_CORE_API std::vector<std::string> families_of(const KernelLaunch& launch);
/// "#define" lines that give the kernel its constants, for a launcher that has no function constants.
/// They stand in front of the others. The kernel then has every buffer of its layout, whether or not
/// the launch binds it: any memory may be bound to those that it leaves out.
UMFA_CORE_API std::string constant_defines(const KernelLaunch& launch);
/// Bytes of each sequence's places in the data of a plan (SequenceParams).
UMFA_CORE_API size_t sequence_bytes();
/// What the GPU would do for the problem, which a GPU of that family (7 to 10) and so many cores could
/// run; throws `Error` if there is no kernel for it, or if it takes several plans.
/// `tiles`: as Tuning has them.
UMFA_CORE_API LaunchPlan plan(const Problem& problem, const ForwardResults& results, int family,
                              int cores, const std::vector<std::string>& tiles = {});
UMFA_CORE_API LaunchPlan plan(const CombineProblem& problem, const CombineResults& results,
                              int family, int cores);
UMFA_CORE_API LaunchPlan plan(const BackwardProblem& problem, const BackwardResults& results,
                              int family, int cores);
/// `faults`: a byte for each block, or null.
UMFA_CORE_API LaunchPlan plan(const QuantizeProblem& problem, const QuantizeResults& results,
                              uint8_t* faults, int family, int cores);
UMFA_CORE_API LaunchPlan plan(const DequantizeProblem& problem, const DequantizeResults& results,
                              int family, int cores);
/// The metallib of all shaders; empty where the build had no compiler of Apple's.
UMFA_CORE_API std::string_view metallib();

}  // namespace umfa::metal
