// Many threads on the Metal host at once, on the double, for the sanitizers: AddressSanitizer sees
// memory that is not a tensor's touched, or an object used after its end; ThreadSanitizer sees what
// is read before the GPU has finished, or written while it may still read; LeakSanitizer the rest.
//
// The GPU is a function that reads every byte of the inputs it was bound, and writes every byte of
// the outputs. It knows them by the addresses that the threads have told it: before they fill the
// inputs, so that only the command queue orders the two. What it does not know is scratch, through
// which the sum of the inputs must reach the launch that merges.
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "runtime/double.h"
#include "umfa/umfa.h"

namespace {

constexpr int64_t heads = 2, head_dim = 32;
constexpr int threads_at_once = 4;
constexpr int calls = 200;  // of each thread

struct Region {
    uint64_t bytes;
    bool written;
};
std::mutex lock;
std::map<const void*, Region> regions;
std::atomic<int> failures{0}, done{0}, refused{0};

void expect(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "stress: %s; the last error of this thread: %s\n", what,
                 umfa_last_error());
    ++failures;
}

/// While set, no pipeline may be built by two threads at once: they have one cache.
std::atomic<bool> one_cache{false};
std::set<std::string> building;

int prepare(const umfa_double_kernel* kernel, uint64_t* static_bytes, char*, size_t) {
    *static_bytes = 4096;
    if (!one_cache) return 0;
    std::string key = kernel->kernel;
    for (uint32_t i = 0; i < kernel->constant_count; ++i)
        key += " " + std::to_string(kernel->constant_values[i]);
    {
        const std::lock_guard guard(lock);
        expect(building.insert(key).second, "two threads build one pipeline");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // as Metal's compiler, or less
    const std::lock_guard guard(lock);
    building.erase(key);
    return 0;
}

int run(const umfa_double_kernel* kernel, char*, size_t) {
    unsigned sum = 0;
    std::vector<std::pair<unsigned char*, uint64_t>> outputs;
    std::vector<unsigned char*> scratch;
    for (uint32_t i = 0; i < kernel->buffer_count; ++i) {
        const umfa_double_buffer& buffer = kernel->buffers[i];
        if (buffer.is_bytes) continue;
        auto* start = static_cast<unsigned char*>(buffer.data) + buffer.offset;
        Region region{};
        {
            const std::lock_guard guard(lock);
            const auto found = regions.find(start);
            if (found != regions.end()) region = found->second;
        }
        if (region.bytes == 0) {
            scratch.push_back(start);
        } else if (region.written) {
            outputs.emplace_back(start, region.bytes);
        } else {
            for (uint64_t j = 0; j < region.bytes; ++j) sum += start[j];
        }
    }
    // Buffers stay bound for the launches after, so that a merge has the inputs, too.
    const bool merges = std::strstr(kernel->kernel, "merge") != nullptr;
    if (!merges && !scratch.empty()) {
        for (unsigned char* start : scratch) std::memcpy(start, &sum, sizeof sum);
        return 0;
    }
    if (merges) std::memcpy(&sum, scratch.at(0), sizeof sum);
    for (auto& [start, bytes] : outputs) std::memset(start, static_cast<int>(sum & 0xff), bytes);
    return 0;
}

/// A tensor in memory of its own, on the host at an odd place or in a Metal buffer.
struct Tensor {
    Tensor(bool metal, int64_t seqlen, bool is_written, std::mt19937& random)
        : shape{1, seqlen, heads, head_dim}, bytes(4u * seqlen * heads * head_dim) {
        const uint64_t offset = 4 * (random() % 64);
        memory = metal ? umfa_double_new_buffer(offset + bytes) : std::malloc(offset + bytes);
        on_metal = metal;
        start = static_cast<unsigned char*>(metal ? umfa_double_buffer_contents(memory) : memory) +
                offset;
        tensor.data = memory;
        tensor.byte_offset = offset;
        tensor.device = {metal ? kDLMetal : kDLCPU, 0};
        tensor.dtype = {kDLFloat, 32, 1};
        tensor.ndim = 4;
        tensor.shape = shape;
        {
            const std::lock_guard guard(lock);
            regions[start] = {bytes, is_written};
        }
        for (uint64_t i = 0; i < bytes; ++i) start[i] = static_cast<unsigned char>(random());
    }
    ~Tensor() {
        {
            const std::lock_guard guard(lock);
            regions.erase(start);
        }
        if (on_metal)
            umfa_double_object_release(memory);
        else
            std::free(memory);
    }
    Tensor(const Tensor&) = delete;

    unsigned sum() const {
        unsigned total = 0;
        for (uint64_t i = 0; i < bytes; ++i) total += start[i];
        return total;
    }

    int64_t shape[4];
    uint64_t bytes;
    void* memory;
    unsigned char* start;
    bool on_metal;
    DLTensor tensor{};
};

struct Kind {
    bool metal = false, encode = false;
    bool decode = false;  // the keys in two parts: two launches, scratch between them
    int softcap = 0;
};

void one_call(const Kind& kind, std::mt19937& random) {
    const auto [metal, encode, decode, softcap] = kind;
    const int64_t seqlen_q = decode ? 1 + random() % 8 : 9 + random() % 30;
    const int64_t seqlen_kv = decode ? 256 + random() % 40 : 1 + random() % 40;
    Tensor q(metal, seqlen_q, false, random), k(metal, seqlen_kv, false, random),
        v(metal, seqlen_kv, false, random), out(metal, seqlen_q, true, random);
    const unsigned expected = q.sum() + k.sum() + v.sum();
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    options.backend = UMFA_BACKEND_METAL;
    options.softcap = softcap;  // another pipeline
    umfa_status status;
    if (encode) {
        void* queue = umfa_double_new_queue();
        void* commands = queue ? umfa_double_new_command_buffer(queue) : nullptr;
        if (!commands) {  // a fault that was meant for umfa
            if (queue) umfa_double_object_release(queue);
            return;
        }
        status = umfa_attention_forward_encode(commands, &q.tensor, &k.tensor, &v.tensor,
                                               &out.tensor, nullptr, &options);
        umfa_double_commit(commands);
        if (umfa_double_wait(commands) != 4) status = UMFA_ERROR_DEVICE;
        umfa_double_object_release(commands);
        umfa_double_object_release(queue);
    } else {
        status =
            umfa_attention_forward(&q.tensor, &k.tensor, &v.tensor, &out.tensor, nullptr, &options);
    }
    if (status != UMFA_OK) {
        expect(status == UMFA_ERROR_DEVICE || status == UMFA_ERROR_OUT_OF_MEMORY ||
                   (encode && status == UMFA_ERROR_UNSUPPORTED),  // no copies there
               "an unexpected kind of error");
        ++refused;
        return;
    }
    ++done;
    expect(out.start[0] == (expected & 0xff) && out.start[out.bytes - 1] == (expected & 0xff),
           "the output is not what the GPU wrote");
}

/// Threads that want the same pipelines, which do not exist, at the same moment.
void first_use() {
    one_cache = true;
    std::barrier together(threads_at_once);
    std::vector<std::thread> threads;
    for (unsigned n = 0; n < threads_at_once; ++n)
        threads.emplace_back([n, &together] {
            std::mt19937 random(n);
            for (int i = 0; i < 24; ++i) {
                together.arrive_and_wait();
                if (n == 0 && i % 4 == 0) umfa_double_release();
                together.arrive_and_wait();
                one_call({n % 2 == 0, false, i % 2 == 0, i / 2 % 2}, random);
            }
        });
    for (std::thread& thread : threads) thread.join();
    one_cache = false;
}

}  // namespace

int main() {
    setenv("UMFA_SELF_TEST", "0", 1);  // this GPU computes nothing, so it would fail
    char folder[] = "/tmp/umfa-stress-XXXXXX";
    expect(mkdtemp(folder) != nullptr, "no folder for archives");
    setenv("XDG_CACHE_HOME", folder, 1);
    umfa_double_set_gpu(prepare, run);
    const umfa_double_device device{"Apple M4", "applegpu_g16g",   9, 1, "AGXAcceleratorG16G",
                                    1,          UMFA_CORES_NUMBER, 10};
    const umfa_double_machine machine{1, &device, 1, 0, 1024, 7};
    umfa_double_set_machine(&machine);
    umfa_double_install(1);

    first_use();
    expect(refused == 0, "a first use was refused");

    std::vector<std::thread> threads;
    std::atomic<int> running{threads_at_once};
    for (unsigned n = 0; n < threads_at_once; ++n)
        threads.emplace_back([n, &running] {
            std::mt19937 random(n);
            for (int i = 0; i < calls; ++i)
                one_call({random() % 2 == 0, random() % 3 == 0, random() % 4 == 0,
                          static_cast<int>(random() % 4)},
                         random);
            --running;
        });
    threads.emplace_back([&running] {  // things go wrong meanwhile
        std::mt19937 random(99);
        for (int next = 5; running > 0;) {
            if (done + refused < next) {
                std::this_thread::yield();
                continue;
            }
            next += 5;
            const auto kind = static_cast<int32_t>(random() % UMFA_FAULT_KINDS);
            // These would stay for all calls after, and copies are not at the tensors' addresses.
            if (kind == UMFA_FAULT_PIPELINE_THREADS || kind == UMFA_FAULT_PIPELINE_MEMORY ||
                kind == UMFA_FAULT_NO_COPY)
                continue;
            if (kind == UMFA_FAULT_ARCHIVE_CRASH) continue;  // it ends the process
            umfa_double_fault(kind, 0, 1, 2 + static_cast<int64_t>(random() % 2));
            if (random() % 4 == 0) umfa_double_release();
        }
        umfa_double_clear_faults();
    });
    for (std::thread& thread : threads) thread.join();

    int64_t live = 0;
    for (int i = 0; i < 2000; ++i) {
        umfa_double_release();
        live = umfa_double_live(nullptr, 0);
        if (live == 0) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    char text[4096] = "";
    umfa_double_live(text, sizeof text);
    if (live != 0) std::fprintf(stderr, "stress: left over:\n%s", text);
    expect(live == 0, "objects are left over");
    const int64_t violations = umfa_double_violations(text, sizeof text);
    if (violations != 0) std::fprintf(stderr, "stress: Metal would have stopped at:\n%s", text);
    expect(violations == 0, "Metal was misused");
    expect(umfa_double_without_pool() == 0, "objects autoreleased without a pool");
    expect(done > calls && refused > calls / 10, "too little was tried");
    std::filesystem::remove_all(folder);
    std::printf("%d calls done, %d refused, %d failures\n", done.load(), refused.load(),
                failures.load());
    return failures == 0 ? 0 : 1;
}
