#import "metal/device.h"

#import <CoreGraphics/CGGeometry.h>

#include <cstdio>
#include <string_view>

#import "metal/gpu_cores.h"
#import "metal/text.h"

namespace umfa::metal {
namespace {

/// MTLCreateSystemDefaultDevice returns nil in a process that has not loaded CoreGraphics, such as a
/// command-line program. A linker with -dead_strip_dylibs drops unused frameworks.
[[gnu::used]] const void* const keeps_core_graphics = &CGRectNull;

/// MTLGPUFamilyApple10, which only the headers of macOS 26 and newer name.
constexpr auto apple10 = static_cast<MTLGPUFamily>(1010);

std::optional<Family> family_of(id<MTLDevice> device) {
    constexpr struct {
        MTLGPUFamily metal;
        Family family;
    } known[] = {{apple10, Family::apple10},
                 {MTLGPUFamilyApple9, Family::apple9},
                 {MTLGPUFamilyApple8, Family::apple8},
                 {MTLGPUFamilyApple7, Family::apple7}};
    for (const auto& entry : known)
        if ([device supportsFamily:entry.metal]) return entry.family;
    return std::nullopt;
}

/// GPU cores of a chip by its name: those of its largest variant. Only how far work is split depends
/// on it.
int assumed_cores(std::string_view name) {
    constexpr struct {
        std::string_view chip;
        int plain, pro, max, ultra;
    } chips[] = {{"M1", 8, 16, 32, 64},
                 {"M2", 10, 19, 38, 76},
                 {"M3", 10, 18, 40, 80},
                 {"M4", 10, 20, 40, 80},
                 {"M5", 10, 20, 40, 80}};
    for (const auto& entry : chips) {
        if (name.find(entry.chip) == std::string_view::npos) continue;
        if (name.find("Ultra") != std::string_view::npos) return entry.ultra;
        if (name.find("Max") != std::string_view::npos) return entry.max;
        if (name.find("Pro") != std::string_view::npos) return entry.pro;
        return entry.plain;
    }
    return Capabilities{}.cores;
}

/// What umfa needs to know of a device. When it cannot use it, nullopt, and why in `reason`.
__attribute__((availability(macos, introduced = 14.0))) std::optional<Gpu> open_device(
    id<MTLDevice> device, std::string& reason) {
    Gpu gpu;
    gpu.device = device;
    gpu.name = text_of(device.name);
    gpu.architecture = text_of(device.architecture.name);
    const std::optional<Family> family = family_of(device);
    if (!family) {
        reason = gpu.name + " is older than GPU family Apple7 (M1), whose matrix operations umfa "
                            "uses, or a virtual machine's";
        return std::nullopt;
    }
    if (!device.hasUnifiedMemory) {
        reason = gpu.name + " does not share the CPU's memory";
        return std::nullopt;
    }
    gpu.capabilities.family = *family;
    const std::optional<int> cores = registered_cores(device.registryID);
    gpu.cores_assumed = !cores;
    gpu.capabilities.cores = cores ? *cores : assumed_cores(gpu.name);
    gpu.capabilities.max_threadgroup_bytes =
        static_cast<uint32_t>(device.maxThreadgroupMemoryLength);
    gpu.capabilities.max_threads = static_cast<uint32_t>(device.maxThreadsPerThreadgroup.width);
    gpu.max_buffer_bytes = device.maxBufferLength;
    gpu.memory_bytes = device.recommendedMaxWorkingSetSize;
    return gpu;
}

bool contains(NSArray<id<MTLDevice>>* devices, id<MTLDevice> device) {
    for (NSUInteger i = 0; i < devices.count; ++i)
        if ([device isEqual:[devices objectAtIndex:i]]) return true;
    return false;
}

}  // namespace

std::optional<Gpu> open_gpu(std::string& reason) {
    if (@available(macOS 14.0, *)) {
        std::string refused;
        const auto open = [&](id<MTLDevice> device) {
            std::string why;
            std::optional<Gpu> gpu = open_device(device, why);
            if (!gpu) refused += (refused.empty() ? "" : "; ") + why;
            return gpu;
        };
        // The list first: the default device may be nil where the list has one, and the list is
        // empty in some sandboxes that have a default device.
        NSArray<id<MTLDevice>>* listed = MTLCopyAllDevices();
        for (NSUInteger i = 0; i < listed.count; ++i)
            if (std::optional<Gpu> gpu = open([listed objectAtIndex:i])) return gpu;
        id<MTLDevice> usual = MTLCreateSystemDefaultDevice();
        if (usual && !contains(listed, usual))
            if (std::optional<Gpu> gpu = open(usual)) return gpu;
        reason = refused.empty() ? "no Metal device" : refused;
    } else {
        reason = "the kernels need macOS 14 or newer";
    }
    return std::nullopt;
}

std::string describe(const Gpu& gpu) {
    char text[64];
    std::snprintf(text, sizeof text, "Apple%d, %d cores%s, %.1f GiB for the GPU",
                  static_cast<int>(gpu.capabilities.family), gpu.capabilities.cores,
                  gpu.cores_assumed ? " assumed" : "",
                  static_cast<double>(gpu.memory_bytes) / (1u << 30));
    return gpu.name + " (" + gpu.architecture + ", " + text + ")";
}

}  // namespace umfa::metal
