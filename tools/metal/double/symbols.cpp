// What Python code that sends messages itself looks up: on a Mac in libobjc and Metal, here by name.
#include <string_view>

#include "runtime/abi.h"

extern "C" {
void objc_msgSend(void);
void* objc_autoreleasePoolPush(void);
void objc_autoreleasePoolPop(void* pool);
void* MTLCreateSystemDefaultDevice(void);
void dispatch_data_create(void);

/// The address of a function; null for an unknown name.
__attribute__((visibility("default"))) void* umfa_double_symbol(const char* name) {
    const std::string_view wanted = name;
    if (wanted == "objc_msgSend") return reinterpret_cast<void*>(&objc_msgSend);
    if (wanted == "objc_getClass") return reinterpret_cast<void*>(&objc::find_class);
    if (wanted == "sel_registerName") return reinterpret_cast<void*>(&objc::unique);
    if (wanted == "objc_autoreleasePoolPush")
        return reinterpret_cast<void*>(&objc_autoreleasePoolPush);
    if (wanted == "objc_autoreleasePoolPop")
        return reinterpret_cast<void*>(&objc_autoreleasePoolPop);
    if (wanted == "MTLCreateSystemDefaultDevice")
        return reinterpret_cast<void*>(&MTLCreateSystemDefaultDevice);
    if (wanted == "dispatch_data_create") return reinterpret_cast<void*>(&dispatch_data_create);
    return nullptr;
}
}
