#include "core/dispatch.h"

#include "core/error.h"

namespace umfa {
namespace {

// The Metal backend has its place in the routing; this build carries no code for it.
Verdict metal_available() { return {false, "this build of umfa has no Metal backend"}; }
bool metal_can_see(Device) { return true; }
void metal_forward(const Problem& problem) {
    fail(ErrorKind::internal, problem.function, "the Metal backend was called", "metal", "cpu");
}
const Backend metal_backend{"metal", 0, metal_available, metal_can_see, metal_forward};

// In order of preference.
const Backend* const all_backends[] = {&metal_backend, &cpu::backend};

Verdict verdict_of(const Backend& backend, const Problem& problem) {
    Verdict verdict = backend.available();
    if (!verdict.yes) return verdict;
    if (!backend.can_see(problem.query.view.device))
        return {false, "the tensors are on " + device_text(problem.query.view)};
    if (const uint32_t missing = problem.features() & ~backend.features) {
        const auto feature = static_cast<Feature>(missing & -missing);  // the lowest set bit
        std::string reason = std::string(name_of(feature)) + " is not implemented";
        if (feature == Feature::dropout)
            reason += " (dropout_p=" + text_of(problem.dropout->p) + ")";
        return {false, reason};
    }
    return verdict;
}

/// The backend that will run the problem, or nullptr with every candidate's reason.
const Backend* choose(const Problem& problem, std::string_view name, std::string& reason) {
    bool known = false;
    for (const Backend* backend : all_backends) {
        if (name != "auto" && name != backend->name) continue;
        known = true;
        const Verdict verdict = verdict_of(*backend, problem);
        if (verdict.yes) return backend;
        if (!reason.empty()) reason += "; ";
        reason += std::string(backend->name) + ": " + verdict.reason;
    }
    if (!known)
        fail(ErrorKind::value, problem.function, "backend is unknown",
             "'" + std::string(name) + "'", "'auto', 'cpu' or 'metal'");
    return nullptr;
}

}  // namespace

Verdict can_run(const Problem& problem, std::string_view name) {
    std::string reason;
    if (choose(problem, name, reason)) return {};
    return {false, reason};
}

const Backend& route(const Problem& problem, std::string_view name) {
    std::string reason;
    if (const Backend* backend = choose(problem, name, reason)) return *backend;
    fail(ErrorKind::unsupported, problem.function, "no backend can run this", reason,
         "what one of the backends supports");
}

std::vector<BackendInfo> backends() {
    std::vector<BackendInfo> list;
    for (const Backend* backend : all_backends) {
        Verdict verdict;
        try {
            verdict = backend->available();
        } catch (const Error& error) {  // an environment variable that makes no sense, say
            verdict = {false, error.what()};
        }
        list.push_back({backend->name, verdict.yes, std::move(verdict.reason)});
    }
    return list;
}

}  // namespace umfa
