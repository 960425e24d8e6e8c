// By itself: a build without Metal, which has no kernels to test, reads the variable too.
#include <cstdlib>
#include <string>
#include <string_view>

#include "core/error.h"
#include "metal/self_test.h"

namespace umfa::metal {

SelfTestMode self_test_mode() {
    const char* text = std::getenv("UMFA_SELF_TEST");
    const std::string_view wish = text ? text : "";
    if (wish.empty() || wish == "1") return SelfTestMode::once;
    if (wish == "0") return SelfTestMode::never;
    if (wish == "force") return SelfTestMode::force;
    fail(ErrorKind::value, "umfa", "UMFA_SELF_TEST is wrong", "'" + std::string(wish) + "'",
         "'0', '1' or 'force'");
}

}  // namespace umfa::metal
