#include "metal/switches.h"

#include <cstdlib>
#include <string>
#include <string_view>

#include "core/error.h"
#include "metal/self_test.h"

namespace umfa::metal {

bool is_on(const char* variable) {
    const char* text = std::getenv(variable);
    const std::string_view wish = text ? text : "";
    if (wish.empty() || wish == "1") return true;
    if (wish == "0") return false;
    fail(ErrorKind::value, "umfa", std::string(variable) + " is wrong",
         "'" + std::string(wish) + "'", "'0' or '1'");
}

void check_environment() {
    self_test_mode();
    for (const char* variable :
         {archive_switch, background_switch, tuning_switch, stream_switch, graph_switch})
        is_on(variable);
}

}  // namespace umfa::metal
