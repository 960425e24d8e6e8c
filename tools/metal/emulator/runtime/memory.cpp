// Buffers and threadgroup memory, and the checks of every access that a kernel reports.

#include <sys/mman.h>

#include <cstring>

#include "state.h"

namespace umfa_runtime {

bool conflicts(uint32_t stamp, uint32_t barrier, uint32_t simd_epoch, uint32_t group, uint32_t t,
               bool across_groups) {
    const uint32_t epoch = stamp >> kThreadBits, other = stamp & (kMaxThreads - 1);
    if (stamp == 0) return false;
    if (epoch < group) return across_groups;
    if (epoch < barrier || other == t) return false;
    return !(other / kLanes == t / kLanes && epoch < simd_epoch);
}

std::string other_text(uint32_t stamp, bool device_memory) {
    const uint32_t epoch = stamp >> kThreadBits, other = stamp & (kMaxThreads - 1);
    if (device_memory && epoch < R.device_group_epoch) {
        const size_t i = static_cast<size_t>(
            std::upper_bound(R.group_epochs.begin(), R.group_epochs.end(), epoch) -
            R.group_epochs.begin() - 1);
        const uint32_t n = R.group_numbers[i];
        const unsigned *g = R.d->threadgroups, *t = R.d->threads;
        return text("thread (%u,%u,%u) of threadgroup (%u,%u,%u)", other % t[0],
                    other / t[0] % t[1], other / t[0] / t[1], n % g[0], n / g[0] % g[1],
                    n / g[0] / g[1]);
    }
    return thread_text(R.fibers[other]);
}

struct Where {
    const char* kind;
    std::string name;
    uint64_t offset;
    bool device_memory;
};

[[noreturn]] void race(const Where& w, uint32_t stamp, bool write, const char* earlier,
                       uint32_t site) {
    fail("data race", site,
         thread_text(*current()) + (write ? " writes " : " reads ") + w.name +
             text(" at byte %llu, which ", static_cast<unsigned long long>(w.offset)) +
             other_text(stamp, w.device_memory) + " " + earlier + " with no barrier between them");
}

// Who touches memory now, and what barriers order its accesses with earlier ones.
struct Toucher {
    uint32_t epoch, barrier, simd_epoch, group, thread;
    bool device_memory;

    bool conflicts_with(uint32_t stamp) const {
        return conflicts(stamp, barrier, simd_epoch, group, thread, device_memory);
    }
};

// The first stamp that conflicts, as its place, or -1. Bytes touched together mostly carry one stamp.
template <int kSize>
inline int first_conflict(const uint32_t* stamps, uint32_t size, const Toucher& by) {
    const uint32_t n = kSize > 0 ? kSize : size;
    uint32_t differ = 0;
    for (uint32_t i = 0; i < n; i++) differ |= stamps[i] ^ stamps[0];
    const uint32_t places = differ == 0 ? 1 : n;
    for (uint32_t i = 0; i < places; i++)
        if (by.conflicts_with(stamps[i])) return static_cast<int>(i);
    return -1;
}

struct Four {
    uint32_t last, beside, other, first;
    bool operator==(const Four&) const = default;
};

inline Four add(Four t, uint32_t own, const Toucher& by) {
    auto thread = [](uint32_t stamp) { return stamp & (kMaxThreads - 1); };
    auto mine = [&](uint32_t stamp) {  // of this simdgroup
        return stamp >> kThreadBits >= by.group && thread(stamp) / kLanes == by.thread / kLanes;
    };
    if (t.first == 0) t.first = own;
    if (!mine(t.last)) {
        t.beside = mine(t.other) && thread(t.other) != by.thread ? t.other : 0;
        t.other = t.last;
    } else if (thread(t.last) != by.thread) {
        t.beside = t.last;
    }
    t.last = own;
    return t;
}

template <int kSize>
inline void note(Touched& touched, uint64_t at, uint32_t size, uint32_t own, const Toucher& by) {
    const uint32_t n = kSize > 0 ? kSize : size;
    uint32_t *l = &touched.last[at], *b = &touched.beside[at], *o = &touched.other[at],
             *f = &touched.first[at];
    uint32_t differ = 0;
    for (uint32_t i = 0; i < n; i++) differ |= (l[i] ^ l[0]) | (b[i] ^ b[0]) | (o[i] ^ o[0]);
    // The first of all is for other threadgroups, which do not see this one's memory.
    if (by.device_memory)
        for (uint32_t i = 0; i < n; i++) differ |= f[i] ^ f[0];
    Four before{l[0], b[0], o[0], f[0]}, after = add(before, own, by);
    if (differ == 0 && before == after) return;
    for (uint32_t i = 0; i < n; i++) {
        if (differ != 0) after = add({l[i], b[i], o[i], f[i]}, own, by);
        l[i] = after.last;
        b[i] = after.beside;
        o[i] = after.other;
        if (by.device_memory) f[i] = after.first;
    }
}

template <int kSize, typename Describe>
inline void track_sized(Stamps& stamps, uint64_t at, uint32_t size, uint32_t flags,
                        const Toucher& by, const Describe& describe, uint32_t site) {
    const uint32_t n = kSize > 0 ? kSize : size;
    const bool write = flags & umfa_access_write, atomic = flags & umfa_access_atomic;
    const uint32_t own = by.epoch << kThreadBits | by.thread;
    auto refuse = [&](const std::vector<uint32_t>& earlier, const char* did) {
        const int k = first_conflict<kSize>(&earlier[at], n, by);
        if (k < 0) return;
        const uint64_t place = at + static_cast<uint64_t>(k);
        race(describe(place), earlier[place], write, did, site);
    };
    auto refuse_all = [&](const Touched& t, const char* did) {
        if (by.device_memory) refuse(t.first, did);
        uint32_t newest = 0;
        for (uint32_t i = 0; i < n; i++) newest = std::max(newest, t.last[at + i]);
        if (newest >> kThreadBits < by.barrier) return;  // so are the others
        refuse(t.last, did);
        refuse(t.beside, did);
        refuse(t.other, did);
    };
    if (atomic) stamps.expect_atomics();
    if (checks(umfa_checks_race)) {
        refuse(stamps.write, "wrote");
        if (write) refuse_all(stamps.read, "read");
        if (stamps.atomics && !atomic) {
            refuse_all(stamps.atomic_write, "wrote atomically");
            if (write) refuse_all(stamps.atomic_read, "read atomically");
        }
    }
    if (atomic)
        note<kSize>(write ? stamps.atomic_write : stamps.atomic_read, at, size, own, by);
    else if (write)
        for (uint32_t i = 0; i < n; i++) stamps.write[at + i] = own;
    else
        note<kSize>(stamps.read, at, size, own, by);
}

template <typename Describe>
inline void track(Stamps& stamps, uint64_t at, uint32_t size, uint32_t flags, const Toucher& by,
                  const Describe& describe, uint32_t site) {
    switch (size) {
        case 2: return track_sized<2>(stamps, at, size, flags, by, describe, site);
        case 4: return track_sized<4>(stamps, at, size, flags, by, describe, site);
        case 8: return track_sized<8>(stamps, at, size, flags, by, describe, site);
        case 16: return track_sized<16>(stamps, at, size, flags, by, describe, site);
        default: return track_sized<0>(stamps, at, size, flags, by, describe, site);
    }
}

void check_alignment(uint64_t address, uint32_t flags, uint32_t site, const Where& w) {
    const uint32_t alignment = flags & umfa_access_alignment;
    if (!checks(umfa_checks_alignment)) return;
    if (address & (alignment - 1))
        fail("misaligned access", site,
             thread_text(*current()) + ((flags & umfa_access_write) ? " writes " : " reads ") +
                 w.name +
                 text(" at byte %lld, which is not a multiple of %u in memory",
                      static_cast<long long>(w.offset), alignment));
}

void device_access(uint64_t p, uint32_t size, uint32_t flags, uint32_t site, bool is_constant) {
    const uint64_t base = reinterpret_cast<uint64_t>(R.slots);
    const bool write = flags & umfa_access_write;
    const uint64_t index = (p - base) >> kSlotBits;
    if (p < base || index >= kSlots) {
        if (is_constant) {
            for (unsigned i = 0; i < R.d->unset_count && checks(umfa_checks_constants); i++) {
                const umfa_unset& u = R.d->unset[i];
                if (p == reinterpret_cast<uint64_t>(u.address))
                    fail("function constant", site,
                         text("function constant '%s' (index %u) is used but has no value", u.name,
                              u.index));
            }
            return;  // a table of the program
        }
        if (!checks(umfa_checks_bounds)) return;
        fail("out of bounds", site,
             thread_text(*current()) + (write ? " writes" : " reads") +
                 " through a pointer that belongs to no buffer");
    }
    if (index == kBuffers)
        fail("unbound buffer", site,
             thread_text(*current()) + (write ? " writes" : " reads") +
                 " an argument whose function constant is false");
    Buffer& b = R.buffers[index];
    const int64_t offset = static_cast<int64_t>(p - reinterpret_cast<uint64_t>(b.data));
    if (offset < 0 || static_cast<uint64_t>(offset) + size > b.size) {
        if (!checks(umfa_checks_bounds)) return;
        if (!b.bound)
            fail("unbound buffer", site,
                 thread_text(*current()) + (write ? " writes" : " reads") +
                     text(" buffer %d, which the dispatch does not bind", static_cast<int>(index)));
        fail("out of bounds", site,
             thread_text(*current()) + (write ? " writes " : " reads ") +
                 text("%u bytes at byte %lld of buffer %d, which has %llu bytes", size,
                      static_cast<long long>(offset), static_cast<int>(index),
                      static_cast<unsigned long long>(b.size)));
    }
    auto describe = [&](uint64_t at) {
        return Where{"buffer", text("buffer %d", static_cast<int>(index)), at, true};
    };
    if (p & ((flags & umfa_access_alignment) - 1))
        check_alignment(p, flags, site, describe(static_cast<uint64_t>(offset)));
    if (write) {
        b.written = true;
        R.counters.buffer_written[index] += size;
    } else {
        R.counters.buffer_read[index] += size;
    }
    if (b.tracked && R.device_epoch < kMaxEpoch) {
        const Simdgroup& s = own_simdgroup();
        const Toucher by{R.device_epoch,       R.device_barrier_epoch, s.device_epoch,
                         R.device_group_epoch, current()->index,       true};
        track(b.stamps, static_cast<uint64_t>(offset), size, flags, by, describe, site);
    }
}

std::string region_name(const Region& region) {
    return region.name ? text("threadgroup variable '%s'", region.name)
                       : text("threadgroup memory %d", region.index);
}

[[gnu::cold, gnu::noinline]] void note_unwritten_read(const Region& g, uint64_t offset,
                                                      uint32_t size, uint32_t site) {
    if (!checks(umfa_checks_uninitialised) || R.unwritten_read) return;
    const Stamps& stamps = R.threadgroup_stamps;
    for (uint64_t i = offset; i < offset + size; i++) {
        uint32_t written = stamps.write[g.shadow + i];
        if (stamps.atomics) written = std::max(written, stamps.atomic_write.last[g.shadow + i]);
        if (written >> kThreadBits >= R.group_epoch) continue;
        R.unwritten_read = true;
        R.unwritten_site = site;
        R.unwritten_text = thread_text(*current()) + " reads " + region_name(g) +
                           text(" at byte %llu, which no thread of this threadgroup has written",
                                static_cast<unsigned long long>(i));
        return;
    }
}

void threadgroup_access(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    Region* g = R.last_region;
    if (g == nullptr || p - g->begin >= g->size) {
        g = nullptr;
        for (Region& candidate : R.regions)
            if (p - candidate.begin < candidate.size) g = &candidate;
    }
    const bool write = flags & umfa_access_write;
    if (g == nullptr || p + size > g->begin + g->size) {
        if (!checks(umfa_checks_bounds)) return;
        // Name the nearest region below, with which the pointer probably began.
        const Region* near = g;
        for (const Region& candidate : R.regions)
            if (near == nullptr ||
                (candidate.begin <= p && (near->begin > p || candidate.begin > near->begin)))
                near = &candidate;
        fail("out of bounds", site,
             thread_text(*current()) + (write ? " writes " : " reads ") +
                 (near == nullptr
                      ? std::string("threadgroup memory that the dispatch did not ask for")
                      : text("%u bytes at byte %lld of ", size,
                             static_cast<long long>(p - near->begin)) +
                            region_name(*near) +
                            text(", which has %llu bytes",
                                 static_cast<unsigned long long>(near->size))));
    }
    R.last_region = g;
    const uint64_t offset = p - g->begin;
    auto describe = [&](uint64_t at) {
        return Where{"threadgroup", region_name(*g), at - g->shadow, false};
    };
    if (p & ((flags & umfa_access_alignment) - 1))
        check_alignment(p, flags, site, describe(g->shadow + offset));
    const bool reads = !write || (flags & umfa_access_atomic && flags & umfa_access_read);
    if (reads) {
        const uint32_t* w = &R.threadgroup_stamps.write[g->shadow + offset];
        uint32_t oldest = w[0];
        for (uint32_t i = 1; i < size; i++) oldest = std::min(oldest, w[i]);
        if (oldest >> kThreadBits < R.group_epoch) note_unwritten_read(*g, offset, size, site);
    }
    const Toucher by{R.epoch,       R.barrier_epoch,  own_simdgroup().threadgroup_epoch,
                     R.group_epoch, current()->index, false};
    track(R.threadgroup_stamps, g->shadow + offset, size, flags, by, describe, site);
}

[[gnu::cold, gnu::noinline]] void fail_steps(uint32_t site) {
    if (!checks(umfa_checks_steps)) return;
    fail("spinning thread", site,
         thread_text(*current()) +
             text(" has made %llu accesses and rounds of loops, the limit: the loop "
                  "does not end, or waits for another thread",
                  static_cast<unsigned long long>(R.d->step_limit)));
}

// Quiet NaNs in every float format, and a large odd integer.
void poison(char* p, size_t n) { memset(p, 0xff, n); }

char* reserve(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes, PROT_NONE, flags, -1, 0);
    return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
}

bool prepare_memory() {
    if (R.slots == nullptr) {
        R.slots = reserve(kSlots * kSlotBytes);
        if (R.slots == nullptr) return false;
        for (int i = 0; i < kBuffers; i++) R.buffers[i] = Buffer{};
    }
    for (int i = 0; i < kBuffers; i++) {
        Buffer& b = R.buffers[i];
        char* middle = R.slots + kSlotBytes * static_cast<uint64_t>(i) + kSlotBytes / 2;
        const umfa_binding& binding = R.d->buffers[i];
        b.bound = binding.data != nullptr || binding.size != 0;
        b.written = false;
        b.size = binding.size;
        b.data = middle + binding.misalignment;
        b.tracked = false;
        if (!b.bound) continue;
        const uint64_t needed = (binding.misalignment + binding.size + 65535) & ~65535ULL;
        if (needed > b.mapped) {
            mprotect(middle, needed, PROT_READ | PROT_WRITE);
            b.mapped = needed;
        }
        memcpy(b.data, binding.data, binding.size);
        if (checks(umfa_checks_race) && binding.may_write) {
            b.tracked = true;
            b.stamps.resize(binding.size);
        }
    }
    if (R.fibers == nullptr) {
        R.fibers = static_cast<Fiber*>(calloc(kMaxThreads, sizeof(Fiber)));
        R.stacks = reserve(kMaxThreads * kStackBytes);
        if (R.stacks == nullptr) return false;
    }
    return true;
}

bool prepare_threadgroup_memory() {
    R.regions.clear();
    R.last_region = nullptr;
    uint64_t total = 0;
    for (unsigned i = 0; i < R.d->variable_count; i++) {
        const umfa_variable& v = R.d->variables[i];
        R.regions.push_back({reinterpret_cast<uint64_t>(v.address), v.size, v.name, -1,
                             static_cast<uint32_t>(total)});
        total += v.size;
    }
    uint64_t dynamic = 0;
    for (int i = 0; i < kBuffers; i++) dynamic += (R.d->threadgroup_bytes[i] + 4095) / 4096 + 2;
    R.arena.resize(dynamic * 4096);
    uint64_t at = (reinterpret_cast<uint64_t>(R.arena.data()) + 4095) & ~4095ULL;
    for (int i = 0; i < kBuffers; i++) {
        const uint64_t size = R.d->threadgroup_bytes[i];
        if (size == 0) continue;
        R.regions.push_back({at, size, nullptr, i, static_cast<uint32_t>(total)});
        total += size;
        at += (size + 8191) & ~4095ULL;  // at least a page between two of them
    }
    R.counters.threadgroup_memory = total;
    R.threadgroup_stamps.resize(total);
    return total <= kMaxThreadgroupBytes;
}

void poison_threadgroup_memory() {
    for (const Region& g : R.regions) poison(reinterpret_cast<char*>(g.begin), g.size);
}

}  // namespace umfa_runtime

using namespace umfa_runtime;

extern "C" {

/// Where an address is for the host. A buffer has a place of its own for each index, which keeps the
/// checks exact, and pointers compare and differ as those into the memory that was bound.
static uint64_t host_address(uint64_t p) {
    const uint64_t index = (p - reinterpret_cast<uint64_t>(R.slots)) >> kSlotBits;
    if (index >= kBuffers || !R.buffers[index].bound) return p;
    return p - reinterpret_cast<uint64_t>(R.buffers[index].data) +
           reinterpret_cast<uint64_t>(R.d->buffers[index].data);
}

uint64_t umfa_host_address_1(uint64_t p) { return host_address(p); }
uint64_t umfa_host_address_2(uint64_t p) { return host_address(p); }

void umfa_step(uint32_t site) {
    if (R.running) count_step(site);
}

void umfa_check_division(uint64_t dividend, uint64_t divisor, unsigned signed_bits) {
    if (!R.running || !checks(umfa_checks_division)) return;
    if (divisor == 0)
        fail("division by zero", umfa_site, thread_text(*current()) + " divides by zero");
    if (signed_bits >= 32 && divisor == ~0ULL && dividend == ~0ULL << (signed_bits - 1))
        fail("division by zero", umfa_site,
             thread_text(*current()) + " divides the smallest integer by -1, which overflows");
}

void umfa_access_1(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    if (!R.running) return;
    count_step(site);
    device_access(p, size, flags, site, false);
}
void umfa_access_2(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    if (!R.running) return;
    count_step(site);
    device_access(p, size, flags, site, true);
}
void umfa_access_3(uint64_t p, uint32_t size, uint32_t flags, uint32_t site) {
    if (!R.running) return;
    count_step(site);
    threadgroup_access(p, size, flags, site);
}

void* umfa_buffer(unsigned index, unsigned long element_size, unsigned alignment) {
    (void)element_size;
    (void)alignment;
    if (index >= kBuffers) return R.slots + kSlotBytes * kBuffers + kSlotBytes / 2;
    return R.buffers[index].data + R.d->buffers[index].offset;
}

void* umfa_threadgroup_memory(unsigned index) {
    for (const Region& g : R.regions)
        if (g.name == nullptr && g.index == static_cast<int>(index))
            return reinterpret_cast<void*>(g.begin);
    return nullptr;
}

}  // extern "C"
