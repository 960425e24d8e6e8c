# Kernels for AMX. AUTO: where the system can grant its registers and the assembler knows its instructions.
# DOUBLE: the same kernels on top of the tests' double of the registers, on any x86-64 with AVX-512 BF16;
# they run only where UMFA_CPU_ISA or a test asks for them.
set(UMFA_AMX AUTO CACHE STRING "Kernels for AMX: AUTO, OFF or DOUBLE")
set_property(CACHE UMFA_AMX PROPERTY STRINGS AUTO OFF DOUBLE)
if(NOT UMFA_AMX MATCHES "^(AUTO|OFF|DOUBLE)$")
  message(FATAL_ERROR "UMFA_AMX is '${UMFA_AMX}'; expected AUTO, OFF or DOUBLE")
endif()

include(CheckCXXSourceCompiles)
check_cxx_source_compiles([[
#include <sys/syscall.h>
#include <unistd.h>
int main() {
    asm volatile("tdpbf16ps %tmm0, %tmm1, %tmm2");
    asm volatile("tdpbssd %tmm0, %tmm1, %tmm2");
    return static_cast<int>(syscall(SYS_arch_prctl, 0, 0));
}
]] UMFA_HAS_AMX)

set(amx_flags ${avx512_flags} -mavx512bf16 -mavx512vnni)
if(UMFA_AMX STREQUAL "DOUBLE")
  target_compile_definitions(libumfa PRIVATE UMFA_AMX UMFA_AMX_DOUBLE)
  list(APPEND amx_flags -iquote ${PROJECT_SOURCE_DIR}/tests/cpu/amx_double)
elseif(UMFA_AMX STREQUAL "AUTO" AND UMFA_HAS_AMX)
  target_compile_definitions(libumfa PRIVATE UMFA_AMX)
else()
  return()
endif()
target_sources(libumfa PRIVATE src/cpu/isa/amx_bf16.cpp)
set_source_files_properties(src/cpu/isa/amx_bf16.cpp PROPERTIES COMPILE_OPTIONS "${amx_flags}")
