// Puts the real Metal backend, on top of the double, into the routing of the libumfa that is loaded.
#include <chrono>

#include "core/dispatch.h"
#include "metal/host.h"
#include "metal/self_test.h"
#include "runtime/double.h"

extern "C" {

void umfa_double_install(int32_t on) {
    umfa::set_metal_backend(on != 0 ? &umfa::metal::backend : nullptr);
}

void umfa_double_self_test_patience(int64_t milliseconds) {
    umfa::metal::set_self_test_patience(std::chrono::milliseconds(milliseconds));
}

void umfa_double_release(void) { umfa::metal::release(); }
}
