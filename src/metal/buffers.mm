#import "metal/buffers.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/stats.h"

namespace umfa::metal {
namespace {

/// Bytes that a tensor with elements reaches, from its first one. Problem::make has checked that
/// they fit 64 bits.
void extent(const TensorView& view, int64_t& begin, int64_t& end) {
    int64_t low = 0, high = 0;
    for (int i = 0; i < view.ndim; ++i) {
        const int64_t reach = (view.shape[i] - 1) * view.strides[i];
        (reach < 0 ? low : high) += reach;
    }
    const int64_t bytes = bits_of(view.dtype) / 8;
    begin = low * bytes;
    end = (high + 1) * bytes;
}

/// Copies the elements of `view` from one place of its layout to another, and nothing between them.
void copy_elements(const TensorView& view, char* to, const char* from, int dimension = 0) {
    const int64_t bytes = bits_of(view.dtype) / 8;
    if (dimension == view.ndim) {
        std::memcpy(to, from, static_cast<size_t>(bytes));
        return;
    }
    const bool run = dimension == view.ndim - 1 && view.strides[dimension] == 1;
    if (run) {
        std::memcpy(to, from, static_cast<size_t>(view.shape[dimension] * bytes));
        return;
    }
    const int64_t step = view.strides[dimension] * bytes;
    for (int64_t i = 0; i < view.shape[dimension]; ++i)
        copy_elements(view, to + i * step, from + i * step, dimension + 1);
}

}  // namespace

Operands::Operands(const Problem& problem, const Gpu& gpu, Copies copies)
    : problem_(problem), gpu_(gpu), copies_(copies) {
    using Source = Binding::Source;
    enum class Use : uint8_t { read, written, updated };
    const auto add = [&](Source source, const TensorView& view, Use use = Use::read) {
        Operand& operand = operands_[static_cast<size_t>(source)];
        operand.view = &view;
        operand.read = use != Use::written;
        operand.written = use != Use::read;
    };
    const Use of_cache = problem.append ? Use::updated : Use::read;
    add(Source::query, problem.query.view);
    add(Source::key, problem.key.view, of_cache);
    add(Source::value, problem.value.view, of_cache);
    add(Source::out, problem.out->view, Use::written);
    if (problem.lse) add(Source::lse, problem.lse->view, Use::written);
    if (problem.append) {
        add(Source::new_key, problem.append->key.view);
        add(Source::new_value, problem.append->value.view);
    }
    if (problem.mask) add(Source::mask, problem.mask->given);
    if (problem.alibi) add(Source::alibi_slopes, problem.alibi->view);
    if (problem.sinks) add(Source::sinks, problem.sinks->logits);
    if (problem.qv) add(Source::qv, problem.qv->view);
    if (problem.rotary) {
        add(Source::rotary_cos, problem.rotary->cos);
        add(Source::rotary_sin, problem.rotary->sin);
    }

    std::vector<Operand*> in_host_memory;
    for (Operand& operand : operands_) {
        if (!operand.view) continue;
        if (operand.view->size() == 0) {
            // Metal has no empty buffers. No kernel reads this one.
            if (!placeholder_)
                placeholder_ = [gpu.device newBufferWithLength:16
                                                       options:MTLResourceStorageModeShared];
            if (!placeholder_)
                fail(ErrorKind::memory, problem.function, "no memory for a Metal buffer",
                     "16 bytes", "a machine with free memory");
            operand.buffer = placeholder_;
            continue;
        }
        extent(*operand.view, operand.begin, operand.end);
        if (operand.view->device == Device::metal)
            use_metal_buffer(operand, operand.read ? "an input" : "out");
        else
            in_host_memory.push_back(&operand);
    }
    map_host_memory(in_host_memory);
}

void Operands::use_metal_buffer(Operand& operand, const char* name) const {
    operand.buffer = (__bridge id<MTLBuffer>)operand.view->data;
    operand.first = operand.view->byte_offset;
    if (![operand.buffer.device isEqual:gpu_.device])
        fail(ErrorKind::value, problem_.function,
             std::string(name) + " is in a buffer of another Metal device",
             device_text(*operand.view), gpu_.name);
    const auto offset = static_cast<int64_t>(operand.view->byte_offset);
    const auto length = static_cast<int64_t>(operand.buffer.length);
    if (offset + operand.begin < 0 || offset + operand.end > length)
        fail(ErrorKind::value, problem_.function,
             std::string(name) + " reaches outside its Metal buffer",
             "bytes " + std::to_string(offset + operand.begin) + " to " +
                 std::to_string(offset + operand.end) + " of " + std::to_string(length),
             "a tensor inside its buffer");
    ++stats().tensors_in_place;
}

/// Metal maps whole pages. Tensors that share some (slices of one, neighbours on the heap) share a
/// buffer, so that no memory is in two of them.
void Operands::map_host_memory(std::vector<Operand*>& operands) {
    const auto page = static_cast<uintptr_t>(getpagesize());
    const auto page_begin = [&](const Operand& operand) {
        return (operand.address() + static_cast<uintptr_t>(operand.begin)) / page * page;
    };
    const auto page_end = [&](const Operand& operand) {
        return (operand.address() + static_cast<uintptr_t>(operand.end) + page - 1) / page * page;
    };
    std::sort(operands.begin(), operands.end(),
              [&](const Operand* a, const Operand* b) { return page_begin(*a) < page_begin(*b); });
    for (size_t first = 0, last; first < operands.size(); first = last) {
        const uintptr_t begin = page_begin(*operands[first]);
        uintptr_t end = page_end(*operands[first]);
        for (last = first + 1; last < operands.size(); ++last) {
            const uintptr_t next = std::max(end, page_end(*operands[last]));
            if (page_begin(*operands[last]) >= end || next - begin > gpu_.max_buffer_bytes) break;
            end = next;
        }
        if (end - begin > gpu_.max_buffer_bytes)
            fail(ErrorKind::unsupported, problem_.function,
                 "a tensor spans more memory than one Metal buffer can",
                 std::to_string(end - begin) + " bytes",
                 "at most " + std::to_string(gpu_.max_buffer_bytes));
        id<MTLBuffer> buffer = [gpu_.device newBufferWithBytesNoCopy:reinterpret_cast<void*>(begin)
                                                              length:end - begin
                                                             options:MTLResourceStorageModeShared
                                                         deallocator:nil];
        for (size_t i = first; i < last; ++i) {
            Operand& operand = *operands[i];
            if (buffer) {
                operand.buffer = buffer;
                operand.first = operand.address() - begin;
                ++stats().tensors_in_place;
            } else {
                copy_in(operand);
            }
        }
    }
}

void Operands::copy_in(Operand& operand) const {
    const auto bytes = static_cast<uint64_t>(operand.end - operand.begin);
    if (copies_ == Copies::refused)
        fail(ErrorKind::unsupported, problem_.function,
             "Metal cannot map a tensor's memory, and a copy would have to be waited for",
             std::to_string(bytes) + " bytes of host memory", "a tensor in a Metal buffer");
    operand.buffer = [gpu_.device newBufferWithLength:bytes options:MTLResourceStorageModeShared];
    if (!operand.buffer)
        fail(ErrorKind::memory, problem_.function, "no memory for the GPU's copy of a tensor",
             std::to_string(bytes) + " bytes", "a smaller problem");
    operand.copied = true;
    operand.first = static_cast<uint64_t>(-operand.begin);
    if (operand.read)
        std::memcpy(operand.buffer.contents, operand.view->address() + operand.begin, bytes);
    ++stats().tensors_copied;
    stats().bytes_copied += bytes;
}

Operands::Bound Operands::bound(const Binding& binding) const {
    const Operand& operand = operands_[static_cast<size_t>(binding.source)];
    if (!operand.buffer)
        fail(ErrorKind::internal, problem_.function, "the plan names a tensor that is not there",
             std::to_string(static_cast<int>(binding.source)), "a tensor of the problem");
    if (operand.buffer == placeholder_) return {placeholder_, 0};
    // The planner may point past the first element, and does so in bytes from the view's start.
    return {operand.buffer, operand.first + binding.byte_offset - operand.view->byte_offset};
}

void Operands::copy_back() const {
    for (const Operand& operand : operands_)
        if (operand.copied && operand.written)
            copy_elements(*operand.view, operand.view->address(),
                          static_cast<const char*>(operand.buffer.contents) + operand.first);
}

}  // namespace umfa::metal
