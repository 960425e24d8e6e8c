// Double of libdispatch: immutable data. Linux only; builds for macOS have Apple's header.
#pragma once

#import <Foundation/Foundation.h>

@interface OS_dispatch_data : NSObject
@end
typedef OS_dispatch_data* dispatch_data_t;
typedef void (^dispatch_block_t)(void);

/// `queue` is not modelled: the double copies the bytes at once, then calls the destructor.
extern "C" dispatch_data_t dispatch_data_create(const void* buffer, size_t size, void* queue,
                                                dispatch_block_t destructor)
    __attribute__((ns_returns_retained));

#define DISPATCH_DATA_DESTRUCTOR_DEFAULT nullptr
