// The C door: DLTensor in, status out. Spelling only; the core checks and computes.
#include "umfa/umfa.h"

#include <cstring>
#include <new>
#include <string>
#include <string_view>

#include "core/dispatch.h"
#include "core/dlpack_view.h"
#include "core/error.h"

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

/// The caller's options over the defaults, as far as the caller's struct reaches.
umfa_attention_options read_options(const umfa_attention_options* given, const char* function) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    if (!given) return options;
    const size_t size = given->struct_size, known = sizeof options;
    if (size < offsetof(umfa_attention_options, causal))
        fail(ErrorKind::value, function, "options->struct_size is too small", std::to_string(size),
             "sizeof(umfa_attention_options), " + std::to_string(known));
    // A caller from the future may set fields this library does not know: only 0 is safe there.
    bool unknown = size > known + 4096;  // no struct of ours: do not even look
    for (size_t i = known; i < size && !unknown; ++i)
        unknown = reinterpret_cast<const unsigned char*>(given)[i] != 0;
    if (unknown)
        fail(ErrorKind::unsupported, function,
             "options has fields that this version of umfa does not know",
             "struct_size " + std::to_string(size), "at most " + std::to_string(known));
    std::memcpy(&options, given, size < known ? size : known);
    return options;
}

int checked_enum(int32_t value, int32_t last, const char* name, const char* function) {
    if (value < 0 || value > last)
        fail(ErrorKind::value, function, std::string(name) + " is unknown", std::to_string(value),
             "0 to " + std::to_string(last));
    return value;
}

struct Call {
    Problem problem;
    const char* backend;
};

/// The arguments that every attention function shares. `function` outlives the problem.
Call read_call(const char* function, const DLTensor* query, const DLTensor* key,
               const DLTensor* value, DLTensor* out, DLTensor* lse,
               const umfa_attention_options* options_or_null) {
    const auto view = [&](const DLTensor* tensor, const char* name) {
        if (!tensor)
            fail(ErrorKind::value, function, std::string(name) + " is missing", "NULL",
                 "a DLTensor");
        return view_of(*tensor, function, name);
    };
    const umfa_attention_options options = read_options(options_or_null, function);
    static constexpr Layout layouts[] = {Layout::bshd, Layout::bhsd};
    static constexpr Causal causals[] = {Causal::none, Causal::bottom_right, Causal::top_left};
    static constexpr const char* backend_names[] = {"auto", "cpu", "metal"};

    if (options.reserved != 0)
        fail(ErrorKind::value, function, "options->reserved is set",
             std::to_string(options.reserved), "0");

    AttentionRequest request;
    request.function = function;
    request.layout = layouts[checked_enum(options.layout, 1, "options->layout", function)];
    request.causal = causals[checked_enum(options.causal, 2, "options->causal", function)];
    request.query = view(query, "query");
    request.key = view(key, "key");
    request.value = view(value, "value");
    request.out = view(out, "out");
    if (lse) request.lse = view(lse, "lse");
    if (options.softmax_scale != 0) request.softmax_scale = options.softmax_scale;
    request.window_left = options.window_left;
    request.window_right = options.window_right;
    request.softcap = options.softcap;
    if (options.alibi_slopes) request.alibi_slopes = view(options.alibi_slopes, "alibi_slopes");
    if (options.attn_mask) request.attn_mask = view(options.attn_mask, "attn_mask");
    return {Problem::make(request),
            backend_names[checked_enum(options.backend, 2, "options->backend", function)]};
}

}  // namespace

extern "C" {

umfa_status umfa_attention_forward(const DLTensor* query, const DLTensor* key,
                                   const DLTensor* value, DLTensor* out, DLTensor* lse,
                                   const umfa_attention_options* options) {
    return guarded([&] {
        const Call call = read_call("umfa_attention_forward", query, key, value, out, lse, options);
        forward(route(call.problem, call.backend), call.problem);
    });
}

umfa_status umfa_attention_forward_encode(void* metal_command_buffer, const DLTensor* query,
                                          const DLTensor* key, const DLTensor* value, DLTensor* out,
                                          DLTensor* lse, const umfa_attention_options* options) {
    return guarded([&] {
        static constexpr const char* function = "umfa_attention_forward_encode";
        if (!metal_command_buffer)
            fail(ErrorKind::value, function, "metal_command_buffer is missing", "NULL",
                 "an id<MTLCommandBuffer> that is not committed");
        const Call call = read_call(function, query, key, value, out, lse, options);
        encode_forward(call.problem,
                       std::string_view(call.backend) == "auto" ? "metal" : call.backend,
                       metal_command_buffer);
    });
}

const char* umfa_last_error(void) { return last_error.c_str(); }

const char* umfa_version(void) { return UMFA_VERSION; }

}  // extern "C"
