// Faults of the processor while a kernel runs: errors of the dispatch.
//
// A thread's stack ends at pages that nothing may touch, and kernels are compiled to touch every page
// of a large frame in turn, so that no array steps over them.

#include <pthread.h>
#include <signal.h>

#include "state.h"

namespace umfa_runtime {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
constexpr size_t kHandlerStack = 64 * 1024;
static struct sigaction earlier[3];
static stack_t earlier_stack;
static pthread_t dispatching;
static char handler_stack[kHandlerStack];

static void put_back() {
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &earlier[i], nullptr);
}

static bool left_its_stack(const Fiber& f, const void* address) {
    const char* at = static_cast<const char*>(address);
    return at >= f.memory && at < f.memory + kGuardBytes;
}

static void on_fault(int signal, siginfo_t* info, void*) {
    if (!R.running || !pthread_equal(pthread_self(), dispatching)) {
        put_back();  // the fault repeats, and the handler before this one gets it
        return;
    }
    const Fiber& f = *current();
    if (signal == SIGFPE)
        fail("division by zero", 0,
             thread_text(f) + " divides by zero, or the smallest integer by -1");
    if (left_its_stack(f, info->si_addr))
        fail("private memory", 0,
             thread_text(f) + text(" needs more than %zu bytes of its own: a huge array, or a "
                                   "recursion without an end",
                                   kStackBytes - kGuardBytes));
    fail("memory fault", 0,
         thread_text(f) +
             " accesses unmapped memory: by an index outside of an array of "
             "its own, or where the check of bounds is off");
}

FaultGuard::FaultGuard() {
    dispatching = pthread_self();
    stack_t own{};
    own.ss_sp = handler_stack;
    own.ss_size = kHandlerStack;
    sigaltstack(&own, &earlier_stack);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &action, &earlier[i]);
}

FaultGuard::~FaultGuard() {
    put_back();
    sigaltstack(&earlier_stack, nullptr);
}

}  // namespace umfa_runtime
