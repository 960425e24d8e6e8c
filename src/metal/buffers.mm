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

Operands::Operands(const LaunchPlan& plan, std::string_view caller, const Gpu& gpu, Copies copies)
    : caller_(caller), gpu_(gpu), copies_(copies), operands_(plan.tensors.size()) {
    std::vector<Operand*> in_host_memory;
    for (size_t i = 0; i < operands_.size(); ++i) {
        Operand& operand = operands_[i];
        operand.tensor = &plan.tensors[i];
        if (operand.view().size() == 0) {
            // Metal has no empty buffers. No kernel reads this one.
            if (!placeholder_)
                placeholder_ = [gpu.device newBufferWithLength:16
                                                       options:MTLResourceStorageModeShared];
            if (!placeholder_)
                fail(ErrorKind::memory, caller, "no memory for a Metal buffer", "16 bytes",
                     "a machine with free memory");
            operand.buffer = placeholder_;
            continue;
        }
        extent(operand.view(), operand.begin, operand.end);
        if (operand.view().device == Device::metal)
            use_metal_buffer(operand);
        else
            in_host_memory.push_back(&operand);
    }
    map_host_memory(in_host_memory);
}

void Operands::use_metal_buffer(Operand& operand) const {
    const char* name = operand.tensor->read ? "an input" : "out";
    operand.buffer = (__bridge id<MTLBuffer>)operand.view().data;
    operand.first = operand.view().byte_offset;
    if (![operand.buffer.device isEqual:gpu_.device])
        fail(ErrorKind::value, caller_,
             std::string(name) + " is in a buffer of another Metal device",
             device_text(operand.view()), gpu_.name);
    const auto offset = static_cast<int64_t>(operand.view().byte_offset);
    const auto length = static_cast<int64_t>(operand.buffer.length);
    if (offset + operand.begin < 0 || offset + operand.end > length)
        fail(ErrorKind::value, caller_, std::string(name) + " reaches outside its Metal buffer",
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
            fail(ErrorKind::unsupported, caller_,
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
        fail(ErrorKind::unsupported, caller_,
             "Metal cannot map a tensor's memory, and a copy would have to be waited for",
             std::to_string(bytes) + " bytes of host memory", "a tensor in a Metal buffer");
    operand.buffer = [gpu_.device newBufferWithLength:bytes options:MTLResourceStorageModeShared];
    if (!operand.buffer)
        fail(ErrorKind::memory, caller_, "no memory for the GPU's copy of a tensor",
             std::to_string(bytes) + " bytes", "a smaller problem");
    operand.copied = true;
    operand.first = static_cast<uint64_t>(-operand.begin);
    if (operand.tensor->read)
        std::memcpy(operand.buffer.contents, operand.view().address() + operand.begin, bytes);
    ++stats().tensors_copied;
    stats().bytes_copied += bytes;
}

Operands::Bound Operands::bound(const Binding& binding) const {
    const Operand& operand = operands_[binding.piece];
    if (operand.buffer == placeholder_) return {placeholder_, 0};
    return {operand.buffer, operand.first + binding.byte_offset};
}

void Operands::copy_back() const {
    for (const Operand& operand : operands_)
        if (operand.copied && operand.tensor->written)
            copy_elements(operand.view(), operand.view().address(),
                          static_cast<const char*>(operand.buffer.contents) + operand.first);
}

}  // namespace umfa::metal
