// Double of Foundation, reference-counted by hand.
#import <CoreGraphics/CGGeometry.h>
#import <Foundation/Foundation.h>
#include <dispatch/dispatch.h>

#include <string>
#include <utility>
#include <vector>

#include "doubles.h"

extern "C" {
id umfa_objc_alloc(Class type);
void umfa_objc_dealloc(id object);
bool umfa_objc_responds(id object, SEL selector);
bool umfa_objc_is_kind(id object, Class type);
bool umfa_objc_conforms(id object, Protocol* protocol);
int64_t umfa_objc_retain_count(id object);
id objc_retain(id object);
void objc_release(id object);
id objc_autorelease(id object);
const char* class_getName(Class type);
Class object_getClass(id object);
}

const CGRect CGRectNull = {};

@implementation NSObject
+ (instancetype)alloc {
    return umfa_objc_alloc((Class)self);
}
+ (instancetype)new {
    return [[self alloc] init];
}
+ (Class)class {
    return (Class)self;
}
- (Class)class {
    return object_getClass(self);
}
- (instancetype)init {
    return self;
}
- (void)dealloc {
    umfa_objc_dealloc(self);
}
- (instancetype)retain {
    return objc_retain(self);
}
- (oneway void)release {
    objc_release(self);
}
- (instancetype)autorelease {
    return objc_autorelease(self);
}
- (NSUInteger)retainCount {
    return (NSUInteger)umfa_objc_retain_count(self);
}
- (BOOL)isEqual:(id)object {
    return self == object;
}
- (BOOL)isKindOfClass:(Class)type {
    return umfa_objc_is_kind(self, type);
}
- (BOOL)respondsToSelector:(SEL)selector {
    return umfa_objc_responds(self, selector);
}
- (BOOL)conformsToProtocol:(Protocol*)protocol {
    return umfa_objc_conforms(self, protocol);
}
- (NSString*)description {
    return [NSString stringWithUTF8String:class_getName([self class])];
}
@end

/// NSString's only subclass that holds text of its own.
@interface UMFAString : NSString {
@public
    std::string _text;
}
@end

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)text {
    UMFAString* string = [UMFAString new];
    string->_text = text;
    return [string autorelease];
}
- (instancetype)initWithBytes:(const void*)bytes
                       length:(NSUInteger)length
                     encoding:(NSStringEncoding)encoding {
    [self release];
    if (encoding != NSUTF8StringEncoding) return nil;
    UMFAString* string = [UMFAString new];
    string->_text.assign((const char*)bytes, length);
    return string;
}
- (const char*)UTF8String {
    return "";
}
- (NSString*)description {
    return self;
}
@end

@implementation UMFAString
- (const char*)UTF8String {
    return _text.c_str();
}
@end

@implementation NSConstantString
- (const char*)UTF8String {
    return _text;
}
@end

@implementation NSNumber {
    long long _value;
}
+ (NSNumber*)umfaWith:(long long)value {
    NSNumber* number = [NSNumber new];
    number->_value = value;
    return number;
}
- (long long)longLongValue {
    return _value;
}
@end

@implementation NSArray {
    std::vector<id> _objects;
}
+ (instancetype)arrayWithObject:(id)object {
    NSArray* array = [NSArray new];
    [array umfaAdd:object];
    return [array autorelease];
}
- (void)dealloc {
    for (id object : _objects) [object release];
    [super dealloc];
}
- (NSUInteger)count {
    return _objects.size();
}
- (id)objectAtIndex:(NSUInteger)index {
    return [[_objects.at(index) retain] autorelease];
}
- (void)umfaAdd:(id)object {
    _objects.push_back([object retain]);
}
@end

@implementation NSURL {
    NSString* _path;
}
+ (NSURL*)fileURLWithPath:(NSString*)path {
    NSURL* url = [NSURL new];
    url->_path = [path retain];
    return [url autorelease];
}
- (void)dealloc {
    [_path release];
    [super dealloc];
}
- (NSString*)path {
    return [[_path retain] autorelease];
}
@end

@implementation NSDictionary
- (NSUInteger)count {
    return 0;
}
@end

@implementation NSMutableDictionary {
    std::vector<std::pair<NSString*, id>> _entries;
}
- (void)dealloc {
    for (auto& [key, value] : _entries) {
        [key release];
        [value release];
    }
    [super dealloc];
}
- (NSUInteger)count {
    return _entries.size();
}
- (void)setObject:(id)value forKey:(id)key {
    _entries.emplace_back([key retain], [value retain]);
}
- (void)umfaCopyInto:(std::vector<std::pair<std::string, std::string>>*)entries {
    for (auto& [key, value] : _entries)
        entries->emplace_back(key.UTF8String, [(NSString*)value UTF8String]);
}
@end

@implementation NSError {
    NSString* _domain;
    NSString* _text;
    NSInteger _code;
}
+ (NSError*)umfaErrorWithDomain:(NSString*)domain code:(NSInteger)code text:(const char*)text {
    NSError* error = [NSError new];
    error->_domain = [domain retain];
    error->_text = [[NSString stringWithUTF8String:text] retain];
    error->_code = code;
    return [error autorelease];
}
- (void)dealloc {
    [_domain release];
    [_text release];
    [super dealloc];
}
- (NSInteger)code {
    return _code;
}
- (NSString*)domain {
    return [[_domain retain] autorelease];
}
- (NSString*)localizedDescription {
    return [[_text retain] autorelease];
}
@end

@implementation OS_dispatch_data {
    std::string _bytes;
}
- (void)umfaAssign:(const void*)bytes length:(size_t)length {
    _bytes.assign((const char*)bytes, length);
}
- (const char*)umfaText {
    return _bytes.c_str();
}
@end

extern "C" dispatch_data_t dispatch_data_create(const void* buffer, size_t size, void*,
                                                dispatch_block_t destructor) {
    OS_dispatch_data* data = [OS_dispatch_data new];
    [data umfaAssign:buffer length:size];
    if (destructor) destructor();
    return data;
}
