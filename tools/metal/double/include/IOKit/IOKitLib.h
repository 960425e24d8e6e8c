// Double of IOKit: what umfa asks of the I/O registry, and CoreFoundation's types for it, declared as
// Apple declares them and no more.
#pragma once

#import <Foundation/Foundation.h>

#ifdef __APPLE__
#include <mach/kern_return.h>
#include <mach/port.h>
#else
typedef int kern_return_t;
typedef unsigned int mach_port_t;
#define KERN_SUCCESS 0
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef const void* CFTypeRef;
typedef const struct __CFAllocator* CFAllocatorRef;
typedef const struct __attribute__((objc_bridge(NSString))) __CFString* CFStringRef;
typedef const struct __attribute__((objc_bridge(NSDictionary))) __CFDictionary* CFDictionaryRef;
typedef struct __attribute__((objc_bridge_mutable(NSMutableDictionary)))
__CFDictionary* CFMutableDictionaryRef;

typedef mach_port_t io_object_t;
typedef io_object_t io_iterator_t;
typedef io_object_t io_registry_entry_t;
typedef uint32_t IOOptionBits;
#define IO_OBJECT_NULL ((io_object_t)0)

extern const mach_port_t kIOMainPortDefault UMFA_MACOS(12.0);

CFMutableDictionaryRef IOServiceMatching(const char* name) __attribute__((cf_returns_retained));
kern_return_t IOServiceGetMatchingServices(mach_port_t port,
                                           CFDictionaryRef __attribute__((cf_consumed)) matching,
                                           io_iterator_t* existing);
io_object_t IOIteratorNext(io_iterator_t iterator);
kern_return_t IORegistryEntryGetRegistryEntryID(io_registry_entry_t entry, uint64_t* id);
CFTypeRef IORegistryEntryCreateCFProperty(io_registry_entry_t entry, CFStringRef key,
                                          CFAllocatorRef allocator, IOOptionBits options)
    __attribute__((cf_returns_retained));
kern_return_t IOObjectRelease(io_object_t object);

#ifdef __cplusplus
}
#endif
