// Double of the I/O registry: the drivers of the machine's GPUs.
#include <IOKit/IOKitLib.h>

#include <deque>

#include "doubles.h"

using namespace metal_double;

@interface UMFARegistryEntry : NSObject {
@public
    DeviceFacts facts;
}
@end
@implementation UMFARegistryEntry
@end

@interface UMFARegistryIterator : NSObject {
@public
    std::deque<io_object_t> left;
}
@end
@implementation UMFARegistryIterator
- (void)dealloc {
    for (const io_object_t entry : left) IOObjectRelease(entry);
    [super dealloc];
}
@end

namespace {

std::mutex lock;
std::map<io_object_t, NSObject*> objects;
io_object_t last = 0x1000;

io_object_t add(NSObject* object) {
    const std::lock_guard guard(lock);
    objects[++last] = object;
    return last;
}

/// The object of a handle; nil, and a violation, where it is none of this class.
template <class Type>
Type* find(io_object_t handle, const char* function) {
    const std::lock_guard guard(lock);
    const auto found = objects.find(handle);
    if (found != objects.end() && [found->second isKindOfClass:[Type class]])
        return (Type*)found->second;
    violation(std::string(function) + ": not such an object of the I/O registry");
    return nil;
}

/// A class's subclasses begin with its name here, as those of AGXAccelerator do.
bool is_of_class(const std::string& name, const std::string& wanted) {
    return name.compare(0, wanted.size(), wanted) == 0;
}

}  // namespace

const mach_port_t kIOMainPortDefault = 0;

extern "C" {

CFMutableDictionaryRef IOServiceMatching(const char* name) {
    @autoreleasepool {
        NSMutableDictionary* matching = [NSMutableDictionary new];
        [matching setObject:[NSString stringWithUTF8String:name]
                     forKey:[NSString stringWithUTF8String:"IOProviderClass"]];
        return (CFMutableDictionaryRef)matching;
    }
}

kern_return_t IOServiceGetMatchingServices(mach_port_t, CFDictionaryRef matching,
                                           io_iterator_t* existing) {
    std::vector<std::pair<std::string, std::string>> entries;
    [(NSMutableDictionary*)matching umfaCopyInto:&entries];
    [(NSMutableDictionary*)matching release];
    *existing = IO_OBJECT_NULL;
    if (fault(UMFA_FAULT_REGISTRY)) return 5;  // KERN_FAILURE
    UMFARegistryIterator* iterator = [UMFARegistryIterator new];
    for (const DeviceFacts& facts : machine().devices) {
        if (facts.driver.empty() || !is_of_class(facts.driver, entries.at(0).second)) continue;
        UMFARegistryEntry* entry = [UMFARegistryEntry new];
        entry->facts = facts;
        iterator->left.push_back(add(entry));
    }
    if (iterator->left.empty())
        [iterator release];
    else
        *existing = add(iterator);
    return KERN_SUCCESS;
}

io_object_t IOIteratorNext(io_iterator_t handle) {
    UMFARegistryIterator* iterator = find<UMFARegistryIterator>(handle, "IOIteratorNext");
    if (!iterator || iterator->left.empty()) return IO_OBJECT_NULL;
    const io_object_t next = iterator->left.front();
    iterator->left.pop_front();
    return next;
}

kern_return_t IORegistryEntryGetRegistryEntryID(io_registry_entry_t handle, uint64_t* id) {
    UMFARegistryEntry* entry = find<UMFARegistryEntry>(handle, "IORegistryEntryGetRegistryEntryID");
    if (!entry) return 4;  // KERN_INVALID_ARGUMENT
    *id = entry->facts.driver_id;
    return KERN_SUCCESS;
}

CFTypeRef IORegistryEntryCreateCFProperty(io_registry_entry_t handle, CFStringRef key,
                                          CFAllocatorRef, IOOptionBits) {
    UMFARegistryEntry* entry = find<UMFARegistryEntry>(handle, "IORegistryEntryCreateCFProperty");
    if (!entry || std::string([(NSString*)key UTF8String]) != "gpu-core-count") return nullptr;
    switch (entry->facts.cores_kind) {
        case UMFA_CORES_NUMBER: return [NSNumber umfaWith:entry->facts.cores];
        case UMFA_CORES_TEXT:
            return
                [[NSString stringWithUTF8String:std::to_string(entry->facts.cores).c_str()] retain];
        default: return nullptr;
    }
}

kern_return_t IOObjectRelease(io_object_t handle) {
    NSObject* object = nil;
    {
        const std::lock_guard guard(lock);
        const auto found = objects.find(handle);
        if (found != objects.end()) {
            object = found->second;
            objects.erase(found);
        }
    }
    if (!object) violation("IOObjectRelease: no object of the I/O registry");
    [object release];
    return object ? KERN_SUCCESS : 4;
}
}
