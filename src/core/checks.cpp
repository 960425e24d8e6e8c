#include "core/checks.h"

#include <algorithm>
#include <cstdlib>

namespace umfa {
namespace {

/// Span of bytes that a view touches, as [begin, end) offsets from element (0, ..., 0).
/// False when the arithmetic leaves 64 bits.
bool extent(const TensorView& view, int64_t& begin, int64_t& end) {
    begin = end = 0;
    if (view.size() == 0) return true;
    int64_t low = 0, high = 0;
    for (int i = 0; i < view.ndim; ++i) {
        int64_t reach = 0;
        if (__builtin_mul_overflow(view.shape[i] - 1, view.strides[i], &reach)) return false;
        if (__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high))
            return false;
    }
    const int64_t bytes = bits_of(view.dtype) / 8;
    return !__builtin_add_overflow(high, int64_t{1}, &high) &&
           !__builtin_mul_overflow(low, bytes, &begin) &&
           !__builtin_mul_overflow(high, bytes, &end);
}

bool overlap(const TensorView& a, const TensorView& b) {
    if (a.device != Device::cpu || b.device != Device::cpu) return false;
    if (a.size() == 0 || b.size() == 0) return false;
    int64_t begin = 0, end = 0, other_begin = 0, other_end = 0;
    extent(a, begin, end);
    extent(b, other_begin, other_end);
    return a.address() + begin < b.address() + other_end &&
           b.address() + other_begin < a.address() + end;
}

[[noreturn]] void refuse_overlap(const Checker& check, const std::string& name,
                                 const std::string& other, const char* use) {
    check.value(name + " overlaps " + other + " in memory", "overlapping ranges of addresses",
                "memory of its own, since " + other + use);
}

}  // namespace

void check_memory(const Checker& check, const TensorView& view, const std::string& name) {
    int64_t begin = 0, end = 0;
    if (!extent(view, begin, end)) {
        std::string strides;
        for (int i = 0; i < view.ndim; ++i)
            strides += (i ? ", " : "") + std::to_string(view.strides[i]);
        check.value(name + " reaches past 64-bit addresses",
                    "shape " + shape_text(view) + " with strides (" + strides + ")",
                    "strides in elements of a tensor in memory");
    }
    if (view.size() == 0) return;
    if (view.data == nullptr)
        check.value(name + " has no memory", "a null pointer with shape " + shape_text(view),
                    "the tensor's data");
    const uint64_t bytes = static_cast<uint64_t>(bits_of(view.dtype) / 8);
    const uint64_t start =
        view.device == Device::cpu ? reinterpret_cast<uint64_t>(view.address()) : view.byte_offset;
    if (start % bytes != 0)
        check.value(
            name + " is not aligned to its " + std::to_string(bytes) + "-byte elements",
            (view.device == Device::cpu ? "address " : "byte offset ") + std::to_string(start),
            "a multiple of " + std::to_string(bytes) + "; make a copy");
}

void check_float_dtype(const Checker& check, const TensorView& view, const std::string& name) {
    if (is_attention_dtype(view.dtype)) return;
    const std::string what = name + " has the wrong dtype",
                      expected = "float32, float16 or bfloat16";
    if (is_other_float(view.dtype)) check.unsupported(what, name_of(view.dtype), expected);
    check.type(what, name_of(view.dtype), expected);
}
DType checked_out_dtype(const Checker& check, const Named<DType>& asked,
                        const Named<TensorView>& out, DType usual) {
    if (asked.given && !is_attention_dtype(*asked.given))
        check.type(asked.name + " is wrong", name_of(*asked.given), "float32, float16 or bfloat16");
    if (!out.given) return asked.given.value_or(usual);
    check_float_dtype(check, *out.given, out.name);
    if (asked.given && *asked.given != out.given->dtype)
        check.type(out.name + " and " + asked.name + " differ",
                   std::string(name_of(out.given->dtype)) + " and " + name_of(*asked.given),
                   "one dtype");
    return out.given->dtype;
}

void check_same_dtype(const Checker& check, const TensorView& view, const std::string& name,
                      const TensorView& as, const std::string& as_name) {
    if (view.dtype != as.dtype)
        check.type("dtype differs: " + as_name + " has " + name_of(as.dtype) + ", " + name +
                       " has " + name_of(view.dtype),
                   name_of(view.dtype), name_of(as.dtype));
}

void check_same_device(const Checker& check, const TensorView& view, const std::string& name,
                       const TensorView& as) {
    if (view.device != as.device || view.device_id != as.device_id)
        check.value(name + " is on another device", device_text(view), device_text(as));
}

void check_overlap(const Checker& check, const TensorView& written, const std::string& name,
                   const TensorView& read, const std::string& other) {
    if (overlap(written, read)) refuse_overlap(check, name, other, " is still being read");
}

void check_both_written(const Checker& check, const TensorView& written, const std::string& name,
                        const TensorView& too, const std::string& other) {
    if (overlap(written, too)) refuse_overlap(check, name, other, " is also written");
}

bool elements_distinct(const TensorView& view) {
    int order[TensorView::max_ndim];
    int count = 0;
    for (int i = 0; i < view.ndim; ++i) {
        if (view.shape[i] == 0) return true;
        if (view.shape[i] == 1) continue;
        int at = count++;
        for (; at > 0 && std::abs(view.strides[order[at - 1]]) > std::abs(view.strides[i]); --at)
            order[at] = order[at - 1];
        order[at] = i;
    }
    int64_t reach = 0;
    for (int i = 0; i < count; ++i) {
        const int64_t stride = std::abs(view.strides[order[i]]);
        if (stride <= reach) return false;
        reach += (view.shape[order[i]] - 1) * stride;
    }
    return true;
}

void check_distinct(const Checker& check, const TensorView& view, const std::string& name) {
    if (!elements_distinct(view))
        check.value(name + " has elements that share memory", "an expanded or overlapping view",
                    "one address for each element");
}

bool interleaved(const TensorView& a, const TensorView& b) {
    if (a.ndim != b.ndim || a.ndim >= TensorView::max_ndim || a.dtype != b.dtype) return false;
    TensorView both = a;
    for (int i = 0; i < a.ndim; ++i) {
        if (a.strides[i] != b.strides[i]) return false;
        both.shape[i] = std::max(a.shape[i], b.shape[i]);
    }
    both.shape[a.ndim] = 2;
    both.strides[a.ndim] = (b.address() - a.address()) / (bits_of(a.dtype) / 8);
    ++both.ndim;
    return elements_distinct(both);
}

}  // namespace umfa
