#include "core/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <utility>

#include "core/error.h"
#include "core/gradient_sums.h"
#include "core/stats.h"

namespace umfa {
namespace {

std::atomic<const Backend*> metal_backend{&metal::backend};

struct Backends {
    const Backend* in_order_of_preference[2] = {metal_backend.load(), &cpu::backend};
    auto begin() const { return std::begin(in_order_of_preference); }
    auto end() const { return std::end(in_order_of_preference); }
};

// What routing must know of each kind of problem.
const Operation<Problem>& operation_of(const Backend& backend, const Problem&) {
    return backend.forward;
}
const Operation<CombineProblem>& operation_of(const Backend& backend, const CombineProblem&) {
    return backend.combine;
}
const Operation<BackwardProblem>& operation_of(const Backend& backend, const BackwardProblem&) {
    return backend.backward;
}
const Operation<QuantizeProblem>& operation_of(const Backend& backend, const QuantizeProblem&) {
    return backend.quantize;
}
const Operation<DequantizeProblem>& operation_of(const Backend& backend, const DequantizeProblem&) {
    return backend.dequantize;
}
const char* task_of(const Problem&) { return "attention"; }
const char* task_of(const CombineProblem&) { return "combining partial results"; }
const char* task_of(const BackwardProblem&) { return "the backward pass of attention"; }
const char* task_of(const QuantizeProblem&) { return "quantizing"; }
const char* task_of(const DequantizeProblem&) { return "dequantizing"; }
const TensorView& first_tensor(const Problem& problem) { return problem.query.view; }
const TensorView& first_tensor(const CombineProblem& problem) { return problem.out_partial.view; }
const TensorView& first_tensor(const BackwardProblem& problem) {
    return problem.forward.query.view;
}
const TensorView& first_tensor(const QuantizeProblem& problem) { return problem.x.view; }
const TensorView& first_tensor(const DequantizeProblem& problem) {
    return problem.operand.data.view;
}

/// What the problem needs of features that the operation lacks; empty if nothing.
std::string missing_text(uint32_t features, const Problem& problem) {
    const uint32_t missing = problem.features() & ~features;
    if (missing == 0) return {};
    const auto feature = static_cast<Feature>(missing & -missing);  // the lowest set bit
    std::string reason = std::string(name_of(feature)) + " is not implemented";
    if (feature == Feature::dropout) reason += " (dropout_p=" + text_of(problem.dropout->p) + ")";
    return reason;
}
std::string missing_text(uint32_t, const CombineProblem&) { return {}; }
std::string missing_text(uint32_t, const QuantizeProblem&) { return {}; }
std::string missing_text(uint32_t, const DequantizeProblem&) { return {}; }
std::string missing_text(uint32_t features, const BackwardProblem& problem) {
    if (std::string missing = missing_text(features, problem.forward); !missing.empty())
        return missing + " in a backward pass";
    return missing_sum_text(problem);
}

template <class P>
Verdict verdict_of(const Backend& backend, const P& problem) {
    const Operation<P>& operation = operation_of(backend, problem);
    // Report a missing feature before a missing backend: it is the more useful reason.
    if (!operation.run) return {false, std::string(task_of(problem)) + " is not implemented"};
    if (std::string missing = missing_text(operation.features, problem); !missing.empty())
        return {false, std::move(missing)};
    Verdict verdict;
    if (operation.can) verdict = operation.can(problem);
    if (!verdict.yes) return verdict;
    verdict = backend.available();
    if (!verdict.yes) return verdict;
    const TensorView& tensor = first_tensor(problem);
    if (!backend.can_see(tensor.device))
        return {false, "the tensors are on " + device_text(tensor)};
    return verdict;
}

template <class P>
Verdict trust_in(const Backend& backend, const P& problem) {
    const auto trusted = operation_of(backend, problem).trusted;
    return trusted ? trusted(problem) : Verdict{};
}

/// What `ask` says of the first operation that it refuses.
template <class Ask>
Verdict of_each(const Steps& steps, const Ask& ask) {
    Verdict verdict;
    if (steps.runs_call) verdict = ask(steps.call);
    if (!verdict.yes) return verdict;
    for (size_t i = 0; verdict.yes && i < steps.forwards.size(); ++i)
        verdict = ask(steps.forwards[i]);
    for (size_t i = 0; verdict.yes && i < steps.combines.size(); ++i)
        verdict = ask(steps.combines[i]);
    if (!verdict.yes) verdict.reason = "for " + steps.purpose + ", " + verdict.reason;
    return verdict;
}
Verdict verdict_of(const Backend& backend, const Steps& steps) {
    return of_each(steps, [&](const auto& step) { return verdict_of(backend, step); });
}
Verdict trust_in(const Backend& backend, const Steps& steps) {
    return of_each(steps, [&](const auto& step) { return trust_in(backend, step); });
}

std::string_view function_of(const Problem& problem) { return problem.function; }
std::string_view function_of(const CombineProblem& problem) { return problem.function; }
std::string_view function_of(const BackwardProblem& problem) { return problem.forward.function; }
std::string_view function_of(const QuantizeProblem& problem) { return problem.function; }
std::string_view function_of(const DequantizeProblem& problem) { return problem.function; }
std::string_view function_of(const Steps& steps) { return steps.call.function; }

bool known(std::string_view name) {
    for (const Backend* backend : Backends{})
        if (name == backend->name) return true;
    return name == "auto";
}

constexpr const char* known_names = "'auto', 'metal' or 'cpu'";

template <class P>
bool is_worthwhile(const Backend& backend, const P& problem) {
    const auto worthwhile = operation_of(backend, problem).worthwhile;
    return !worthwhile || first_tensor(problem).device != Device::cpu || worthwhile(problem);
}

bool is_worthwhile(const Backend& backend, const Steps& steps) {
    return is_worthwhile(backend, steps.call);
}

template <class P>
bool may_wait(const P& problem) {
    for (const Backend* backend : Backends{}) {
        const auto waits = operation_of(*backend, problem).may_wait;
        if (waits && waits(problem)) return true;
    }
    return false;
}
bool may_wait(const Steps& steps) {
    return !of_each(steps, [](const auto& step) { return Verdict{!may_wait(step), {}}; }).yes;
}

/// The backend that runs the problem while `backend` compiles its kernels; nullptr if none should.
template <class P>
const Backend* instead_of(const Backend& backend, const P& problem) {
    const auto postpone = operation_of(backend, problem).postpone;
    if (!postpone || first_tensor(problem).device != Device::cpu) return nullptr;
    for (const Backend* other : Backends{}) {
        if (other == &backend || operation_of(*other, problem).prepare) continue;
        if (verdict_of(*other, problem).yes && postpone(problem)) return other;
    }
    return nullptr;
}
const Backend* instead_of(const Backend&, const Steps&) { return nullptr; }

/// The backend that will run the problem, or nullptr with every candidate's reason. `now`: the call
/// runs next, so that its kernels are worth compiling.
template <class P>
const Backend* choose(const P& problem, std::string_view wish, std::string& reason,
                      bool now = false) {
    const std::string name = backend_name(wish, function_of(problem));
    const Backend* possible = nullptr;  // can, though it may not be worth its start
    const auto takes = [&](const Backend& backend, Verdict verdict) {
        if (verdict.yes) verdict = trust_in(backend, problem);
        if (verdict.yes) return true;
        if (!reason.empty()) reason += "; ";
        reason += std::string(backend.name) + ": " + verdict.reason;
        return false;
    };
    for (const Backend* backend : Backends{}) {
        if (name != "auto" && name != backend->name) continue;
        Verdict verdict = verdict_of(*backend, problem);
        if (verdict.yes && name == "auto" && !is_worthwhile(*backend, problem)) {
            if (!possible) possible = backend;
            continue;
        }
        if (verdict.yes && name == "auto" && now) {
            if (const Backend* other = instead_of(*backend, problem)) {
                ++stats().calls_while_compiling;
                return other;
            }
        }
        if (takes(*backend, std::move(verdict))) return backend;
    }
    return possible && takes(*possible, {}) ? possible : nullptr;
}

template <class P>
Verdict asked(const P& problem, std::string_view name) {
    std::string reason;
    if (choose(problem, name, reason)) return {};
    return {false, reason};
}

template <class P>
const Backend& routed(const P& problem, std::string_view name, bool now = false) {
    std::string reason;
    if (const Backend* backend = choose(problem, name, reason, now)) return *backend;
    const std::string_view function = function_of(problem);
    const std::string meant = backend_name(name, function);
    const bool free = meant == "auto";
    fail(ErrorKind::unsupported, function,
         (free ? "no backend can run this (" : "the backend cannot run this (") + reason + ")",
         "backend '" + meant + "'" + (meant == name ? "" : " by UMFA_BACKEND"),
         free ? "what one of the backends supports" : "'auto', or what that backend supports");
}

/// What the self-test of the backend's device excludes; empty if nothing.
std::string doubts_about(const Backend& backend) {
    if (!backend.self_tests) return {};
    std::string text;
    try {
        for (const auto& report : backend.self_tests(false))
            for (const SelfTestResult& result : report->results)
                if (!result.fault.empty())
                    text += (text.empty() ? "" : "; ") + result.family + ": " + result.fault;
    } catch (const Error& error) {  // UMFA_SELF_TEST is invalid
        return error.what();
    }
    return text.empty() ? text : "the self-test of this GPU excludes " + text;
}

/// Runs a part of a problem on the player's stream, or else on the backend.
template <class P>
void play(const Backend& backend, const P& part, const typename P::Results& results,
          Player& player) {
    const Operation<P>& operation = operation_of(backend, part);
    if (operation.play && operation.play(part, results, player)) return;
    player.instead([&] { operation.run(part, results); });
}

void count_call(const Backend& backend) {
    ++(&backend == &cpu::backend ? stats().cpu_calls : stats().metal_calls);
}

}  // namespace

std::string backend_name(std::string_view name, std::string_view function) {
    if (!known(name))
        fail(ErrorKind::value, function, "backend is unknown", "'" + std::string(name) + "'",
             known_names);
    if (name != "auto") return std::string(name);
    static const std::string wish = [] {
        const char* text = std::getenv("UMFA_BACKEND");
        std::string found = text && *text ? text : "auto";
        if (!known(found))
            fail(ErrorKind::value, "umfa", "UMFA_BACKEND is not a known backend", "'" + found + "'",
                 known_names);
        return found;
    }();
    return wish;
}

Verdict can_run(const Problem& problem, std::string_view name) { return asked(problem, name); }

Verdict can_run(const CombineProblem& problem, std::string_view name) {
    return asked(problem, name);
}

Verdict can_run(const Steps& steps, std::string_view name) { return asked(steps, name); }

Verdict can_run(const BackwardProblem& problem, std::string_view name) {
    return asked(problem, name);
}

Verdict can_run(const QuantizeProblem& problem, std::string_view name) {
    return asked(problem, name);
}

Verdict can_run(const DequantizeProblem& problem, std::string_view name) {
    return asked(problem, name);
}

bool routing_may_wait(const Problem& problem) { return may_wait(problem); }
bool routing_may_wait(const CombineProblem& problem) { return may_wait(problem); }
bool routing_may_wait(const Steps& steps) { return may_wait(steps); }
bool routing_may_wait(const BackwardProblem& problem) { return may_wait(problem); }
bool routing_may_wait(const QuantizeProblem& problem) { return may_wait(problem); }
bool routing_may_wait(const DequantizeProblem& problem) { return may_wait(problem); }

const Backend& route(const Problem& problem, std::string_view name) {
    return routed(problem, name);
}

const Backend& route(const CombineProblem& problem, std::string_view name) {
    return routed(problem, name);
}

const Backend& route(const Steps& steps, std::string_view name) { return routed(steps, name); }

const Backend& route(const BackwardProblem& problem, std::string_view name) {
    return routed(problem, name);
}

const Backend& route(const QuantizeProblem& problem, std::string_view name) {
    return routed(problem, name);
}

const Backend& route(const DequantizeProblem& problem, std::string_view name) {
    return routed(problem, name);
}

const Backend& route_call(const Problem& problem, std::string_view name) {
    return routed(problem, name, true);
}

Warmup warm_up(const Problem& problem, std::string_view name, const ForwardResults& results) {
    const Backend& backend = route(problem, name);
    Warmup done{backend.name, {}};
    if (!backend.forward.prepare) return done;
    for_each_part(problem, results, [&](const Problem& part, const ForwardResults& written) {
        const Kernels kernels = backend.forward.prepare(part, written);
        // Parts differ in addresses alone, so they use the same kernels, or nearly.
        done.kernels.used = std::max(done.kernels.used, kernels.used);
        done.kernels.built += kernels.built;
    });
    return done;
}

Warmup warm_up(const CombineProblem& problem, std::string_view name) {
    const Backend& backend = route(problem, name);
    if (!backend.combine.prepare) return {backend.name, {}};
    return {backend.name,
            backend.combine.prepare(problem, {{problem.out_shape()}, {problem.lse_shape()}})};
}

const char* warm_up(const Problem& problem, std::string_view name, const ForwardResults& results,
                    Player& player) {
    const Backend& backend = route(problem, name);
    for_each_part(problem, results, [&](const Problem& part, const ForwardResults& written) {
        if (backend.forward.play) backend.forward.play(part, written, player);
    });
    return backend.name;
}

const char* warm_up(const CombineProblem& problem, std::string_view name, Player& player) {
    const Backend& backend = route(problem, name);
    if (backend.combine.play)
        backend.combine.play(problem, {{problem.out_shape()}, {problem.lse_shape()}}, player);
    return backend.name;
}

void forward(const Backend& backend, const Problem& problem, const ForwardResults& results) {
    for_each_part(problem, results, backend.forward.run);
    count_call(backend);
}

void combine(const Backend& backend, const CombineProblem& problem, const CombineResults& results) {
    backend.combine.run(problem, results);
    count_call(backend);
}

void backward(const Backend& backend, const BackwardProblem& problem,
              const BackwardResults& results) {
    with_sums(problem, results, [&](const BackwardProblem& own, const BackwardResults& written) {
        backend.backward.run(own, written);
    });
    count_call(backend);
}

void quantize(const Backend& backend, const QuantizeProblem& problem,
              const QuantizeResults& results) {
    backend.quantize.run(problem, results);
    count_call(backend);
}

void dequantize(const Backend& backend, const DequantizeProblem& problem,
                const DequantizeResults& results) {
    backend.dequantize.run(problem, results);
    count_call(backend);
}

void forward(const Backend& backend, const Problem& problem, const ForwardResults& results,
             Player& player) {
    for_each_part(problem, results, [&](const Problem& part, const ForwardResults& own) {
        play(backend, part, own, player);
    });
    count_call(backend);
}

void backward(const Backend& backend, const BackwardProblem& problem,
              const BackwardResults& results, Player& player) {
    // Sums are the host's, so that a tensor that the host cannot read has none (missing_sum_text).
    with_sums(problem, results, [&](const BackwardProblem& own, const BackwardResults& written) {
        play(backend, own, written, player);
    });
    count_call(backend);
}

void combine(const Backend& backend, const CombineProblem& problem, const CombineResults& results,
             Player& player) {
    play(backend, problem, results, player);
    count_call(backend);
}

void quantize(const Backend& backend, const QuantizeProblem& problem,
              const QuantizeResults& results, Player& player) {
    play(backend, problem, results, player);
    count_call(backend);
}

void dequantize(const Backend& backend, const DequantizeProblem& problem,
                const DequantizeResults& results, Player& player) {
    play(backend, problem, results, player);
    count_call(backend);
}

void encode_forward(const Problem& problem, const ForwardResults& results, std::string_view name,
                    void* stream) {
    const Backend& backend = route(problem, name);
    if (!backend.forward.encode)
        fail(ErrorKind::unsupported, problem.function, "this backend has no streams", backend.name,
             "'metal'");
    for_each_part(problem, results, [&](const Problem& part, const ForwardResults& own) {
        backend.forward.encode(part, own, stream);
    });
    count_call(backend);
}

const Backend& backend_of(Device device, std::string_view function) {
    std::string reasons;
    for (const Backend* backend : Backends{}) {
        if (!backend->can_see(device) || (device != Device::cpu && !backend->allocate)) continue;
        const Verdict verdict = backend->available();
        if (verdict.yes) return *backend;
        reasons = std::string(backend->name) + ": " + verdict.reason;
    }
    fail(ErrorKind::unsupported, function, "no backend can allocate memory on this device",
         reasons.empty() ? "no backend" : reasons, "a device that this build of umfa can use");
}

void set_metal_backend(const Backend* backend) {
    metal_backend = backend ? backend : &metal::backend;
}

Stats& stats() {
    static Stats counts;
    return counts;
}

SelfTestReports self_tests(bool run) {
    SelfTestReports all;
    for (const Backend* backend : Backends{}) {
        if (!backend->self_tests) continue;
        for (const auto& report : backend->self_tests(run)) all.push_back(report);
    }
    return all;
}

std::optional<Tuned> tuning() {
    for (const Backend* backend : Backends{}) {
        // Asked first: an invalid environment variable is an error without a GPU too.
        const bool there = backend->available().yes;
        if (there && backend->tuning) return backend->tuning();
    }
    return {};
}

Tuned tune(const Tuned& tuned, bool keep) {
    std::string reason = "this build of umfa has none";
    for (const Backend* backend : Backends{}) {
        if (!backend->tune) continue;
        const Verdict verdict = backend->available();
        if (verdict.yes) return backend->tune(tuned, keep);
        reason = verdict.reason;
    }
    fail(ErrorKind::unsupported, "umfa.tune", "there is no GPU to tune", reason,
         "a Mac with Apple silicon");
}

std::vector<BackendInfo> backends() {
    std::vector<BackendInfo> list;
    for (const Backend* backend : Backends{}) {
        Verdict verdict;
        try {
            verdict = backend->available();
        } catch (const Error& error) {  // an environment variable that makes no sense, say
            verdict = {false, error.what()};
        }
        std::string device = verdict.yes && backend->describe ? backend->describe() : "";
        if (verdict.yes) verdict.reason = doubts_about(*backend);
        list.push_back({backend->name, verdict.yes, std::move(verdict.reason), std::move(device)});
    }
    return list;
}

}  // namespace umfa
