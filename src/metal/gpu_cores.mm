#import "metal/gpu_cores.h"

#import <Foundation/Foundation.h>
#include <IOKit/IOKitLib.h>

#include "metal/text.h"

namespace umfa::metal {
namespace {

/// The class of the drivers of Apple's own GPUs; each chip's driver is of a subclass.
constexpr const char* driver_class = "AGXAccelerator";
constexpr const char* count_key = "gpu-core-count";
/// What is beyond this is no count of cores.
constexpr long long most_cores = 1024;

/// Gives an object of the I/O registry back.
class Registered {
public:
    explicit Registered(io_object_t object) : object_(object) {}
    ~Registered() { IOObjectRelease(object_); }
    Registered(const Registered&) = delete;
    Registered& operator=(const Registered&) = delete;

private:
    const io_object_t object_;
};

std::optional<int> cores_of(io_registry_entry_t driver) {
    // The function sees no more than the address: it must not be released before.
    NSString* const key __attribute__((objc_precise_lifetime)) = ns_string(count_key);
    const id found = (__bridge_transfer id)IORegistryEntryCreateCFProperty(
        driver, (__bridge CFStringRef)key, nullptr, 0);
    if (![found isKindOfClass:[NSNumber class]]) return std::nullopt;
    const long long count = [(NSNumber*)found longLongValue];
    if (count < 1 || count > most_cores) return std::nullopt;
    return static_cast<int>(count);
}

}  // namespace

std::optional<int> registered_cores(uint64_t registry_id) {
    io_iterator_t drivers = IO_OBJECT_NULL;
    // It releases the dictionary, whatever it returns. Without a driver there may be no iterator.
    if (IOServiceGetMatchingServices(kIOMainPortDefault, IOServiceMatching(driver_class),
                                     &drivers) != KERN_SUCCESS ||
        drivers == IO_OBJECT_NULL)
        return std::nullopt;
    const Registered releases_drivers(drivers);
    int others = 0;
    std::optional<int> cores;
    while (const io_registry_entry_t driver = IOIteratorNext(drivers)) {
        const Registered releases_driver(driver);
        uint64_t id = 0;
        if (IORegistryEntryGetRegistryEntryID(driver, &id) == KERN_SUCCESS && id == registry_id)
            return cores_of(driver);
        ++others;
        cores = cores_of(driver);
    }
    // A Mac has one GPU of Apple's own: the only driver is its driver, should the IDs differ.
    return others == 1 ? cores : std::nullopt;
}

}  // namespace umfa::metal
