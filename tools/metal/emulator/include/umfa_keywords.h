// Metal's keywords and scalar types. Address spaces 1, 2 and 3 are those of LLVM for GPUs, so that
// clang itself rejects mixed ones and the compiled text still says which memory an access touches.
#pragma once

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel UMFA_KERNEL  // the back end's

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#if defined(UMFA_WIDE_HALF)
typedef double half;  // for the second reading, see implicit.py
#else
typedef _Float16 half;
#endif
typedef __bf16 bfloat;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef decltype(sizeof(0)) size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
