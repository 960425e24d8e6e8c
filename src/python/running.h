// What bindings that compute share.
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

#include <exception>
#include <string_view>

#include "core/dispatch.h"
#include "core/tensor_view.h"

namespace umfa::python {

namespace nb = nanobind;

/// Runs `body` with the GIL released.
///
/// Not nb::gil_scoped_release: when the interpreter is shutting down, CPython before 3.14 answers
/// a daemon thread that wants the GIL back with pthread_exit(), and unwinding through a destructor
/// or a noexcept frame ends the process with std::terminate. Such a thread waits here for the
/// process to end instead, which is what CPython 3.14 does.
template <class F>
void without_gil(F&& body) {
    PyThreadState* state = PyEval_SaveThread();
    std::exception_ptr error;
    try {
        body();
    } catch (...) {
        error = std::current_exception();
    }
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        for (;;) pause();
    }
    if (error) std::rethrow_exception(error);
}

/// can_run and route of core/dispatch.h. They release the GIL only if routing may wait, because
/// releasing it lets other threads run first.
template <class P>
Verdict judged(const P& problem, std::string_view backend_name) {
    if (!routing_may_wait(problem)) return can_run(problem, backend_name);
    Verdict verdict;
    without_gil([&] { verdict = can_run(problem, backend_name); });
    return verdict;
}

template <class P>
const Backend& routed(const P& problem, std::string_view backend_name) {
    if (!routing_may_wait(problem)) return route(problem, backend_name);
    const Backend* backend = nullptr;
    without_gil([&] { backend = &route(problem, backend_name); });
    return *backend;
}

/// The same of route_call().
inline const Backend& routed_call(const Problem& problem, std::string_view backend_name) {
    if (!routing_may_wait(problem)) return route_call(problem, backend_name);
    const Backend* backend = nullptr;
    without_gil([&] { backend = &route_call(problem, backend_name); });
    return *backend;
}

/// (backend, kernels used, kernels built) of warm_up().
template <class F>
nb::tuple warmed_up(F&& warm_up) {
    Warmup done{};
    without_gil([&] { done = warm_up(); });
    return nb::make_tuple(done.backend, done.kernels.used, done.kernels.built);
}

inline nb::object shape_tuple(const TensorView& view) {
    const int64_t* n = view.shape;
    if (view.ndim == 4) return nb::make_tuple(n[0], n[1], n[2], n[3]);  // the usual one: no list
    nb::list sizes;
    for (int i = 0; i < view.ndim; ++i) sizes.append(n[i]);
    return nb::tuple(sizes);
}

}  // namespace umfa::python
