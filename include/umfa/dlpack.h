/* DLTensor, as the DLPack specification (version 1.x) lays it out in memory.
 *
 * When the DLPack project's own header is installed or included before, it is used; else the few
 * declarations that umfa.h needs are made here, with the same names and the same layout. A program
 * that includes another copy of dlpack.h includes it before this one. */
#ifndef UMFA_DLPACK_H_
#define UMFA_DLPACK_H_

#if !defined(DLPACK_DLPACK_H_) && defined(__has_include)
#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#endif
#endif

#ifndef DLPACK_DLPACK_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Not an enum: producers may send any code, also those not named here. */
typedef int32_t DLDeviceType;
enum { kDLCPU = 1, kDLMetal = 8 /* data is an id<MTLBuffer> */ };

typedef struct {
    DLDeviceType device_type;
    int32_t device_id;
} DLDevice;

enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

typedef struct {
    uint8_t code; /* kDLInt, ... */
    uint8_t bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;     /* in elements; NULL: compact, row-major */
    uint64_t byte_offset; /* from data to the first element */
} DLTensor;

#ifdef __cplusplus
}
#endif

#endif /* DLPACK_DLPACK_H_ */
#endif /* UMFA_DLPACK_H_ */
