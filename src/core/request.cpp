#include "core/request.h"

namespace umfa {

const char* name_of(Field field) {
    static constexpr const char* names[] = {
#define UMFA_OPERAND(name) #name,
#define UMFA_INPUT(name, autocast, text) #name,
#define UMFA_TABLE(name, text) #name,
#define UMFA_NUMBER(name, value, text) #name,
#define UMFA_MAYBE_NUMBER(name, text) #name,
#define UMFA_COUNT(name, value, text) #name,
#define UMFA_MAYBE_COUNT(name, text) #name,
#define UMFA_SEED(name, text) #name,
#define UMFA_OFFSET(name, text) #name,
#define UMFA_FLAG(name, value, text) #name,
#define UMFA_CHOICE(name, type, value, text) #name,
#define UMFA_DTYPE(name, text) #name,
#define UMFA_FORMAT(name, text) #name,
#define UMFA_WINDOW(name, text) #name,
#define UMFA_OUTPUT(name) #name,
#define UMFA_RESULT_FLAG(name, value) #name,
#include "core/options.def"
    };
    return names[static_cast<size_t>(field)];
}

Function::Function(std::string its_name) : name(std::move(its_name)) {
    for (size_t i = 0; i < field_count; ++i) names[i] = name_of(static_cast<Field>(i));
}

}  // namespace umfa
