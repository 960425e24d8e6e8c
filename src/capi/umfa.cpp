// The C binding: DLTensor in, status out. The core checks and computes.
#include "umfa/umfa.h"

#include <cstddef>
#include <cstring>
#include <iterator>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "core/dispatch.h"
#include "core/dlpack_view.h"
#include "core/error.h"
#include "core/weights.h"

namespace {

using namespace umfa;

thread_local std::string last_error;

umfa_status status_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::value: return UMFA_ERROR_VALUE;
        case ErrorKind::type: return UMFA_ERROR_TYPE;
        case ErrorKind::unsupported: return UMFA_ERROR_UNSUPPORTED;
        case ErrorKind::memory: return UMFA_ERROR_OUT_OF_MEMORY;
        case ErrorKind::device: return UMFA_ERROR_DEVICE;
        case ErrorKind::internal: break;
    }
    return UMFA_ERROR_INTERNAL;
}

template <class F>
umfa_status guarded(F&& body) noexcept {
    try {
        body();
        return UMFA_OK;
    } catch (const Error& error) {
        last_error = error.what();
        return status_of(error.kind());
    } catch (const std::bad_alloc&) {
        last_error = "out of memory";  // short enough for std::string to hold without allocating
        return UMFA_ERROR_OUT_OF_MEMORY;
    } catch (const std::exception& error) {
        last_error = error.what();
        return UMFA_ERROR_INTERNAL;
    } catch (...) {
        last_error = "unknown exception";
        return UMFA_ERROR_INTERNAL;
    }
}

/// The caller's struct over the defaults, as far as it reaches. `least`: bytes that every version has.
template <class Struct>
Struct read_struct(const Struct* given, const Struct& defaults, size_t least, const char* name,
                   const char* function) {
    Struct found = defaults;
    if (!given) return found;
    const size_t size = given->struct_size, known = sizeof found;
    const std::string called = name;
    if (size < least)
        fail(ErrorKind::value, function, called + "->struct_size is too small",
             std::to_string(size),
             "sizeof(umfa_attention_" + called + "), " + std::to_string(known));
    // A caller from the future may set fields this library does not know: only 0 is safe there.
    bool unknown = size > known + 4096;  // no struct of ours: do not even look
    for (size_t i = known; i < size && !unknown; ++i)
        unknown = reinterpret_cast<const unsigned char*>(given)[i] != 0;
    if (unknown)
        fail(ErrorKind::unsupported, function,
             called + " has fields that this version of umfa does not know",
             "struct_size " + std::to_string(size), "at most " + std::to_string(known));
    std::memcpy(&found, given, size < known ? size : known);
    return found;
}

umfa_attention_options read_options(const umfa_attention_options* given, const char* function) {
    return read_struct(given, umfa_attention_options UMFA_ATTENTION_OPTIONS_INIT,
                       offsetof(umfa_attention_options, backend), "options", function);
}

umfa_attention_gradients read_gradients(const umfa_attention_gradients* given,
                                        const char* function) {
    if (!given)
        fail(ErrorKind::value, function, "gradients is missing", "NULL",
             "an umfa_attention_gradients");
    return read_struct(given, umfa_attention_gradients UMFA_ATTENTION_GRADIENTS_INIT,
                       offsetof(umfa_attention_gradients, dquery), "gradients", function);
}

int checked_enum(int32_t value, int32_t last, const char* name, const char* function) {
    if (value < 0 || value > last)
        fail(ErrorKind::value, function, std::string(name) + " is unknown", std::to_string(value),
             "0 to " + std::to_string(last));
    return value;
}

const char* checked_backend(int32_t value, const char* name, const char* function) {
    static constexpr const char* names[] = {"auto", "cpu", "metal"};
    return names[checked_enum(value, 2, name, function)];
}

std::optional<DType> checked_dtype(int32_t value, const char* name, const char* function) {
    static constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
    const int number = checked_enum(value, int32_t(std::size(dtypes)), name, function);
    if (number == 0) return {};
    return dtypes[number - 1];
}

/// The public functions in each layout; they outlive every call.
struct Names {
    explicit Names(const char* function) : bshd(function), bhsd(function) {
        bhsd.layout = Layout::bhsd;
    }
    Function bshd, bhsd;
};

struct Call {
    AttentionRequest request;
    const char* backend;
};

TensorView checked_view(const DLTensor* tensor, const Function& function, const char* name) {
    if (!tensor)
        fail(ErrorKind::value, function.name, std::string(name) + " is missing", "NULL",
             "a DLTensor");
    return view_of(*tensor, function.name, name);
}

/// The beginning of a caller's text for a message. Bytes that are not ASCII characters become '?'.
std::string shown(const char* text) {
    constexpr size_t most = 80;
    std::string found(text, strnlen(text, most + 1));
    if (found.size() > most) found.replace(most, 1, "...");
    for (char& c : found)
        if (c < ' ' || c > '~') c = '?';
    return "'" + found + "'";
}

QuantFormat checked_format(const char* text, const char* name, const std::string& function) {
    const std::optional<QuantFormat> found = quant_format_from(text);
    if (!found)
        fail(ErrorKind::value, function, std::string(name) + " is not the text of a format",
             shown(text), quant_format_words);
    return *found;
}

/// Copies every option of options.def into the request.
void read_fields(const umfa_attention_options& options, AttentionRequest& request) {
    const std::string& called = request.function->name;
#define UMFA_INPUT(name, autocast, text) \
    if (options.name) request.name = view_of(*options.name, called, #name);
#define UMFA_TABLE(name, text) \
    if (options.name) request.name = view_of(*options.name, called, #name);
#define UMFA_NUMBER(name, value, text) request.name = options.name;
#define UMFA_MAYBE_NUMBER(name, text) \
    if (options.name != 0) request.name = options.name;
#define UMFA_COUNT(name, value, text) request.name = options.name;
#define UMFA_MAYBE_COUNT(name, text) \
    if (options.name != -1) request.name = options.name;
#define UMFA_SEED(name, text) request.name = options.name;
#define UMFA_OFFSET(name, text) request.name = options.name;
#define UMFA_FLAG(name, value, text) \
    request.name = checked_enum(options.name, 1, "options->" #name, called.c_str()) != 0;
#define UMFA_CHOICE(name, type, value, text)                                                   \
    request.name =                                                                             \
        static_cast<type>(checked_enum(options.name, int32_t(std::size(names_of(type{}))) - 1, \
                                       "options->" #name, called.c_str()));
#define UMFA_DTYPE(name, text) \
    request.name = checked_dtype(options.name, "options->" #name, called.c_str());
#define UMFA_FORMAT(name, text) \
    if (options.name) request.name = checked_format(options.name, "options->" #name, called);
#define UMFA_WINDOW(name, text)                \
    request.name##_left = options.name##_left; \
    request.name##_right = options.name##_right;
#include "core/options.def"
}

/// The arguments that every attention function shares. `names` outlive the problem.
Call read_call(const Names& names, const DLTensor* query, const DLTensor* key,
               const umfa_attention_options* options_or_null) {
    const char* called = names.bshd.name.c_str();
    const umfa_attention_options options = read_options(options_or_null, called);
    const Function& function =
        checked_enum(options.layout, 1, "options->layout", called) == 0 ? names.bshd : names.bhsd;
    AttentionRequest request(function);
    request.query = checked_view(query, function, "query");
    request.key = checked_view(key, function, "key");
    read_fields(options, request);
    return {request, checked_backend(options.backend, "options->backend", called)};
}

/// The tensors that are written. `lse` may be null.
struct Written {
    TensorView out;
    std::optional<TensorView> lse;
};

Written read_written(const Function& function, const DLTensor* out, const DLTensor* lse) {
    Written written{checked_view(out, function, "out"), {}};
    if (lse) written.lse = checked_view(lse, function, "lse");
    return written;
}

struct ForwardCall {
    Problem problem;
    ForwardResults results;
    const char* backend;
};

/// The arguments of umfa_attention_forward, all checked.
ForwardCall read_forward(const Names& names, const DLTensor* query, const DLTensor* key,
                         const DLTensor* value, const DLTensor* out, const DLTensor* lse,
                         const umfa_attention_options* options) {
    Call call = read_call(names, query, key, options);
    call.request.value = checked_view(value, names.bshd, "value");
    const Written written = read_written(*call.request.function, out, lse);
    call.request.out = written.out;  // the problem takes its dtype
    call.request.return_lse = written.lse.has_value();
    Problem problem = Problem::make(call.request);
    const ForwardResults results = problem.results(written.out, written.lse);
    return {std::move(problem), results, call.backend};
}

struct BackwardCall {
    BackwardProblem problem;
    Gradients gradients;  // to be written
    const char* backend;
};

BackwardCall read_backward(const Names& names, const DLTensor* query, const DLTensor* key,
                           const DLTensor* value, const DLTensor* out, const DLTensor* lse,
                           const DLTensor* dout, const DLTensor* dlse,
                           const umfa_attention_gradients* gradients,
                           const umfa_attention_options* options) {
    const std::string& called = names.bshd.name;
    const umfa_attention_gradients own = read_gradients(gradients, called.c_str());
    Call call = read_call(names, query, key, options);
    call.request.value = checked_view(value, names.bshd, "value");
    BackwardRequest request(call.request);
    request.out = checked_view(out, names.bshd, "out");
    request.lse = checked_view(lse, names.bshd, "lse");
    request.dout = checked_view(dout, names.bshd, "dout");
    if (dlse) request.dlse = view_of(*dlse, called, "dlse");
    // In the order of core/backward.h.
    const DLTensor* written[gradient_count] = {own.dquery, own.dkey,   own.dvalue,       own.dqv,
                                               own.dmask,  own.dsinks, own.dalibi_slopes};
    Gradients views;
    for (size_t i = 0; i < gradient_count; ++i) {
        if (!written[i]) continue;
        const auto gradient = static_cast<Gradient>(i);
        request.wanted |= bit(gradient);
        views[i] = view_of(*written[i], called, name_of(gradient));
    }
    return {BackwardProblem::make(request), views, call.backend};
}

/// `function` outlives the problem.
CombineProblem read_combination(const Function& function, const DLTensor* out_partial,
                                const DLTensor* lse_partial, const std::optional<TensorView>& out) {
    return CombineProblem::make({function.name,
                                 checked_view(out_partial, function, "out_partial"),
                                 checked_view(lse_partial, function, "lse_partial"),
                                 {},
                                 out});
}

struct CombineCall {
    CombineProblem problem;
    CombineResults results;
};

/// The tensors of umfa_attention_combine, all checked. `function` outlives the problem.
CombineCall read_combine(const Function& function, const DLTensor* out_partial,
                         const DLTensor* lse_partial, const DLTensor* out, const DLTensor* lse) {
    const TensorView to = checked_view(out, function, "out");
    const TensorView to_lse = checked_view(lse, function, "lse");
    const CombineProblem problem = read_combination(function, out_partial, lse_partial, to);
    return {problem, problem.results(to, to_lse)};
}

}  // namespace

extern "C" {

umfa_status umfa_attention_forward(const DLTensor* query, const DLTensor* key,
                                   const DLTensor* value, DLTensor* out, DLTensor* lse,
                                   const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_forward");
        const auto [problem, results, backend] =
            read_forward(names, query, key, value, out, lse, options);
        forward(route_call(problem, backend), problem, results);
    });
}

umfa_status umfa_attention_can_run(const DLTensor* query, const DLTensor* key,
                                   const DLTensor* value, const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_can_run");
        Call call = read_call(names, query, key, options);
        call.request.value = checked_view(value, names.bshd, "value");
        route(Problem::make(call.request), call.backend);
    });
}

umfa_status umfa_attention_forward_encode(void* metal_command_buffer, const DLTensor* query,
                                          const DLTensor* key, const DLTensor* value, DLTensor* out,
                                          DLTensor* lse, const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_forward_encode");
        if (!metal_command_buffer)
            fail(ErrorKind::value, names.bshd.name, "metal_command_buffer is missing", "NULL",
                 "an id<MTLCommandBuffer> that is not committed");
        const auto [problem, results, backend] =
            read_forward(names, query, key, value, out, lse, options);
        encode_forward(problem, results, std::string_view(backend) == "auto" ? "metal" : backend,
                       metal_command_buffer);
    });
}

umfa_status umfa_attention_warmup(const DLTensor* query, const DLTensor* key, const DLTensor* value,
                                  const DLTensor* out, const DLTensor* lse,
                                  const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_warmup");
        const auto [problem, results, backend] =
            read_forward(names, query, key, value, out, lse, options);
        warm_up(problem, backend, results);
    });
}

umfa_status umfa_attention_backward(const DLTensor* query, const DLTensor* key,
                                    const DLTensor* value, const DLTensor* out, const DLTensor* lse,
                                    const DLTensor* dout, const DLTensor* dlse,
                                    const umfa_attention_gradients* gradients,
                                    const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_backward");
        const auto [problem, written, backend] =
            read_backward(names, query, key, value, out, lse, dout, dlse, gradients, options);
        const BackwardResults results = problem.results(written);
        backward(route(problem, backend), problem, results);
    });
}

umfa_status umfa_attention_backward_can_run(const DLTensor* query, const DLTensor* key,
                                            const DLTensor* value, const DLTensor* out,
                                            const DLTensor* lse, const DLTensor* dout,
                                            const DLTensor* dlse,
                                            const umfa_attention_gradients* gradients,
                                            const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_backward_can_run");
        const auto [problem, written, backend] =
            read_backward(names, query, key, value, out, lse, dout, dlse, gradients, options);
        (void)problem.results(written);  // which checks them
        route(problem, backend);
    });
}

umfa_status umfa_attention_combine(const DLTensor* out_partial, const DLTensor* lse_partial,
                                   DLTensor* out, DLTensor* lse, int32_t backend) {
    return guarded([&] {
        static const Function function("umfa_attention_combine");
        const char* name = checked_backend(backend, "backend", function.name.c_str());
        const auto [problem, results] = read_combine(function, out_partial, lse_partial, out, lse);
        combine(route(problem, name), problem, results);
    });
}

umfa_status umfa_attention_combine_can_run(const DLTensor* out_partial, const DLTensor* lse_partial,
                                           int32_t backend) {
    return guarded([&] {
        static const Function function("umfa_attention_combine_can_run");
        const char* name = checked_backend(backend, "backend", function.name.c_str());
        route(read_combination(function, out_partial, lse_partial, {}), name);
    });
}

umfa_status umfa_attention_combine_warmup(const DLTensor* out_partial, const DLTensor* lse_partial,
                                          const DLTensor* out, const DLTensor* lse,
                                          int32_t backend) {
    return guarded([&] {
        static const Function function("umfa_attention_combine_warmup");
        const char* name = checked_backend(backend, "backend", function.name.c_str());
        const CombineCall call = read_combine(function, out_partial, lse_partial, out, lse);
        warm_up(call.problem, name);
    });
}

umfa_status umfa_attention_weights(const DLTensor* query, const DLTensor* key, DLTensor* matrix,
                                   const umfa_attention_options* options) {
    return guarded([&] {
        static const Names names("umfa_attention_weights");
        const Call call = read_call(names, query, key, options);
        const TensorView view = checked_view(matrix, names.bshd, "weights");
        const Problem problem = make_weights_problem(call.request);
        weights(route(weights_steps(problem, false), call.backend), problem, view);
    });
}

const char* umfa_last_error(void) { return last_error.c_str(); }

const char* umfa_version(void) { return UMFA_VERSION; }

}  // extern "C"
