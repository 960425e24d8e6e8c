// Double of Foundation: what umfa's host calls, declared as Apple declares it and no more. Used on
// Linux, where foundation.mm implements it, and to check a build for macOS where no SDK is.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __APPLE__
#include <objc/NSObject.h>  // Apple's own
#include <objc/objc.h>
#else
typedef unsigned long NSUInteger;
typedef long NSInteger;
#if __OBJC_BOOL_IS_BOOL
typedef bool BOOL;
#else
typedef signed char BOOL;
#endif
#define YES __objc_yes
#define NO __objc_no
#define nil nullptr
#define __MAC_OS_X_VERSION_MAX_ALLOWED 150000  // the macOS whose headers these are
#endif

#ifndef FOUNDATION_EXPORT
#define FOUNDATION_EXPORT extern "C"
#endif
#ifndef NS_ASSUME_NONNULL_BEGIN
#define NS_ASSUME_NONNULL_BEGIN _Pragma("clang assume_nonnull begin")
#define NS_ASSUME_NONNULL_END _Pragma("clang assume_nonnull end")
#endif
#ifndef NS_ENUM
#define NS_ENUM(Type, Name) \
    enum Name : Type Name;  \
    enum Name : Type
#define NS_OPTIONS(Type, Name) \
    enum Name : Type Name;     \
    enum Name : Type
#endif
#ifndef NS_RETURNS_INNER_POINTER
#define NS_RETURNS_INNER_POINTER __attribute__((objc_returns_inner_pointer))
#endif
#define UMFA_MACOS(version) __attribute__((availability(macos, introduced = version)))
#define UMFA_MACOS_UNTIL(version, last) \
    __attribute__((availability(macos, introduced = version, deprecated = last)))

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wnullability-completeness"
NS_ASSUME_NONNULL_BEGIN

typedef double CFTimeInterval;
@class NSString, NSError, NSArray, NSDictionary, NSURL;

#ifndef __APPLE__
@protocol NSObject
- (BOOL)isEqual:(nullable id)object;
- (BOOL)isKindOfClass:(Class)type;
- (BOOL)respondsToSelector:(SEL)selector;
- (BOOL)conformsToProtocol:(Protocol*)protocol;
#if !__has_feature(objc_arc)
- (instancetype)retain;
- (oneway void)release;
- (instancetype)autorelease;
- (NSUInteger)retainCount;
#endif
@property(readonly, copy) NSString* description;
@end

__attribute__((objc_root_class))
@interface NSObject<NSObject> {
    Class isa;
}
+ (instancetype)alloc;
+ (instancetype)new;
+ (Class)class;
- (Class)class;
- (instancetype)init;
- (void)dealloc;
@end
#endif

typedef NS_ENUM(NSUInteger, NSStringEncoding) { NSUTF8StringEncoding = 4 };

@interface NSString : NSObject
+ (nullable instancetype)stringWithUTF8String:(const char*)text;
- (nullable instancetype)initWithBytes:(const void*)bytes
                                length:(NSUInteger)length
                              encoding:(NSStringEncoding)encoding;
@property(readonly, nullable) const char* UTF8String NS_RETURNS_INNER_POINTER;
@end

@interface NSConstantString : NSString {
    const char* _text;
    unsigned int _length;
}
@end

@interface NSNumber : NSObject
@property(readonly) long long longLongValue;
@end

@interface NSArray<__covariant Object> : NSObject
+ (instancetype)arrayWithObject:(Object)object;
@property(readonly) NSUInteger count;
- (Object)objectAtIndex:(NSUInteger)index;
@end

@interface NSURL : NSObject
+ (NSURL*)fileURLWithPath:(NSString*)path;
@property(nullable, readonly, copy) NSString* path;
@end

@interface NSDictionary<__covariant Key, __covariant Value> : NSObject
@property(readonly) NSUInteger count;
@end

@interface NSMutableDictionary<Key, Value> : NSDictionary <Key, Value>
- (void)setObject:(Value)value forKey:(Key)key;
@end

@interface NSError : NSObject
@property(readonly) NSInteger code;
@property(readonly, copy) NSString* domain;
@property(readonly, copy) NSString* localizedDescription;
@end

NS_ASSUME_NONNULL_END
#pragma clang diagnostic pop
