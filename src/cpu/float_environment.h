// Floating point as the language has it.
#pragma once

#include <cfenv>

namespace umfa::cpu {

/// The default environment while in scope: results must have the same bits whatever rounding or
/// flush-to-zero mode the calling thread is in, or a pool thread was born with.
class DefaultFloatEnvironment {
public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

private:
    std::fenv_t saved_;
};

}  // namespace umfa::cpu
