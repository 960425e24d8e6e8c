# Kernels for AMX, where the system can grant its registers and the assembler knows its instructions.
include(CheckCXXSourceCompiles)
check_cxx_source_compiles([[
#include <sys/syscall.h>
#include <unistd.h>
int main() {
    asm volatile("tdpbf16ps %tmm0, %tmm1, %tmm2");
    return static_cast<int>(syscall(SYS_arch_prctl, 0, 0));
}
]] UMFA_HAS_AMX)
if(UMFA_HAS_AMX)
  target_sources(libumfa PRIVATE src/cpu/isa/amx_bf16.cpp)
  target_compile_definitions(libumfa PRIVATE UMFA_AMX)
  set_source_files_properties(src/cpu/isa/amx_bf16.cpp PROPERTIES
    COMPILE_OPTIONS "${avx512_flags};-mavx512bf16")
endif()
