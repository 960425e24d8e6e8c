#include "cpu/quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/float_environment.h"
#include "cpu/isa/select.h"
#include "cpu/thread_pool.h"

namespace umfa::cpu {
namespace {

constexpr int64_t lanes = 16;              // of the widest vector
constexpr int64_t numbers_of_task = 8192;  // about

char* address(const Operand& operand, int64_t offset) {
    return operand.view.address() + offset * (bits_of(operand.view.dtype) / 8);
}

uint32_t bits_at(const Operand& operand, int64_t offset) {
    const char* at = address(operand, offset);
    uint32_t word = 0;
    uint16_t half = 0;
    switch (bits_of(operand.view.dtype)) {
        case 32: std::memcpy(&word, at, sizeof word); return word;
        case 16: std::memcpy(&half, at, sizeof half); return half;
        default: return static_cast<uint8_t>(*at);
    }
}

void put_bits(const Operand& operand, int64_t offset, uint32_t bits) {
    char* at = address(operand, offset);
    const auto half = static_cast<uint16_t>(bits);
    switch (bits_of(operand.view.dtype)) {
        case 32: std::memcpy(at, &bits, sizeof bits); break;
        case 16: std::memcpy(at, &half, sizeof half); break;
        default: *at = static_cast<char>(bits);
    }
}

/// One head of one index of the batch.
struct Head {
    int64_t batch, head;

    int64_t offset(const Operand& operand, int64_t row) const {
        return batch * operand.stride_batch + head * operand.stride_head + row * operand.stride_row;
    }
};

/// Calls body(head, first row block, end) for all row blocks of all heads, on the thread pool.
template <class F>
void for_row_blocks(const QuantSizes& sizes, int64_t row_blocks, int64_t block_rows,
                    const F& body) {
    if (sizes.batch * sizes.heads * row_blocks == 0) return;
    const int64_t numbers = block_rows * sizes.channels;
    const int64_t together = std::clamp<int64_t>(numbers_of_task / numbers, 1, row_blocks);
    const int64_t of_head = (row_blocks + together - 1) / together;
    const double all =
        static_cast<double>(sizes.batch * sizes.heads * row_blocks) * static_cast<double>(numbers);
    parallel_for(sizes.batch * sizes.heads * of_head, threads_worth(4 * all), [&](int64_t task) {
        const int64_t index = task / of_head, first = task % of_head * together;
        body(Head{index / sizes.heads, index % sizes.heads}, first,
             std::min(row_blocks, first + together));
    });
}

void keep_smallest(std::atomic<int64_t>& kept, int64_t value) {
    int64_t found = kept.load();
    while (value < found && !kept.compare_exchange_weak(found, value)) {
    }
}

/// Quantises the row blocks of one problem.
class Quantizer {
public:
    Quantizer(const QuantizeProblem& problem, const QuantizeResults& results)
        : problem_(problem),
          results_(results),
          sizes_(problem.sizes),
          format_(problem.format),
          codes_(problem.format.codes()),
          load_(kernels_for(kernels(), problem.x.view.dtype).combine),
          kernel_(quant_kernel(kernels())),
          room_(problem.sizes.channels + lanes) {}

    void run() {
        if (sizes_.one_block) {
            run_one_block();
        } else {
            for_row_blocks(sizes_, sizes_.row_blocks(), sizes_.block_rows,
                           [&](const Head& head, int64_t first, int64_t end) {
                               Scratch scratch(room_);
                               for (int64_t block = first; block < end; ++block)
                                   row_block(head, block, scratch);
                           });
        }
        if (!problem_.allow_nonfinite) refuse_nonfinite();
    }

private:
    struct Scratch {
        explicit Scratch(int64_t room) : row(thread_scratch(8 * room)) {
            low = row + room;
            high = row + 2 * room;
            magnitude = reinterpret_cast<uint32_t*>(row + 3 * room);
            scales = {row + 4 * room, row + 5 * room, row + 6 * room};
            bytes = reinterpret_cast<uint8_t*>(row + 7 * room);
        }
        float *row, *low, *high;
        uint32_t* magnitude;
        uint8_t* bytes;  // codes of 4 bits, before two share one
        ChannelScales scales;
        bool poisoned = false;
    };

    bool has_zeros() const { return format_.offset == QuantOffset::zero_point; }

    void load(const Head& head, int64_t row, float* to) const {
        std::fill_n(to, room_, 0.f);
        load_.add(address(problem_.x, head.offset(problem_.x, row)), problem_.x.stride_channel,
                  sizes_.channels, 1.f, to);
    }

    /// The ranges of all channels over some rows.
    void measure(const Head& head, int64_t first, int64_t end, Scratch& scratch) const {
        std::fill_n(scratch.magnitude, sizes_.channels, 0u);
        std::fill_n(scratch.low, sizes_.channels, 0.f);
        std::fill_n(scratch.high, sizes_.channels, 0.f);
        for (int64_t row = first; row < end; ++row) {
            load(head, row, scratch.row);
            kernel_.widen(scratch.row, sizes_.channels, !has_zeros(), scratch.magnitude,
                          scratch.low, scratch.high);
        }
    }

    static QuantRange widened(QuantRange a, const QuantRange& b) {
        return {std::max(a.magnitude, b.magnitude), std::min(a.low, b.low),
                std::max(a.high, b.high)};
    }

    static QuantRange range_of(const Scratch& scratch, int64_t first, int64_t end) {
        QuantRange range{0, 0, 0};
        for (int64_t c = first; c < end; ++c)
            range = widened(range, {scratch.magnitude[c], scratch.low[c], scratch.high[c]});
        return range;
    }

    /// Writes scale and zero point of a block and sets them for its channels. `place`: of the block
    /// among all, for the message about one that is not finite.
    void set_scale(const QuantRange& range, int64_t scale_offset, int64_t zero_offset,
                   int64_t first, int64_t end, int64_t place, Scratch& scratch) {
        const uint32_t bits = quant_scale_bits(codes_, format_.scale_kind(), range);
        put_bits(results_.scales, scale_offset, bits);
        QuantScale scale{0, 0};
        int zero = 0;
        if (is_poison(format_.scale_kind(), bits)) {
            scratch.poisoned = true;
            keep_smallest(range.magnitude < 0x7f800000u ? too_large_ : nonfinite_, place);
        } else if (bits != 0) {
            scale.value = quant_scale(format_.scale_kind(), bits);
            scale.inverse = 1.f / scale.value;
            if (has_zeros()) zero = quant_zero(codes_, range.low, scale);
        }
        if (has_zeros()) put_bits(*results_.zero_points, zero_offset, static_cast<uint32_t>(zero));
        const float marked = scratch.poisoned && is_poison(format_.scale_kind(), bits)
                                 ? std::numeric_limits<float>::quiet_NaN()
                                 : scale.value;
        std::fill(scratch.scales.scale + first, scratch.scales.scale + end, marked);
        std::fill(scratch.scales.inverse + first, scratch.scales.inverse + end, scale.inverse);
        std::fill(scratch.scales.offset + first, scratch.scales.offset + end,
                  static_cast<float>(zero));
    }

    void encode(const Head& head, int64_t first, int64_t end, const Scratch& scratch) const {
        for (int64_t row = first; row < end; ++row) {
            load(head, row, scratch.row);
            auto* to =
                reinterpret_cast<uint8_t*>(address(results_.data, head.offset(results_.data, row)));
            if (scratch.poisoned)
                encode_poisoned(scratch, to);
            else
                kernel_.encode(codes_, scratch.row, sizes_.channels, scratch.scales, scratch.bytes,
                               to);
        }
    }

    /// Blocks whose scale is NaN have codes of 0.
    void encode_poisoned(const Scratch& scratch, uint8_t* to) const {
        const auto is_bad = [&](int64_t c) {
            return scratch.scales.scale[c] != scratch.scales.scale[c];
        };
        // low is free by now.
        std::copy_n(scratch.scales.scale, sizes_.channels, scratch.low);
        for (int64_t c = 0; c < sizes_.channels; ++c)
            if (is_bad(c)) scratch.low[c] = scratch.row[c] = 0;
        kernel_.encode(codes_, scratch.row, sizes_.channels,
                       {scratch.low, scratch.scales.inverse, scratch.scales.offset}, scratch.bytes,
                       to);
        for (int64_t c = 0; c < sizes_.channels; ++c)
            if (is_bad(c)) clear_code(c, to);
    }

    void clear_code(int64_t channel, uint8_t* row) const {
        const QuantPlace<int64_t> place = quant_place(codes_, format_.scale_kind(), channel);
        const unsigned mask = ((1u << bits_of_codes(codes_)) - 1) << place.shift;
        row[place.byte] = static_cast<uint8_t>(row[place.byte] & ~mask);
    }

    void row_block(const Head& head, int64_t block, Scratch& scratch) {
        const int64_t first = block * sizes_.block_rows;
        const int64_t end = std::min(sizes_.rows, first + sizes_.block_rows);
        measure(head, first, end, scratch);
        scratch.poisoned = false;
        const int64_t scale = head.offset(results_.scales, block);
        const int64_t zero = has_zeros() ? head.offset(*results_.zero_points, block) : 0;
        const int64_t place =
            ((head.batch * sizes_.heads + head.head) * sizes_.row_blocks() + block) *
            sizes_.channel_blocks();
        for (int64_t i = 0; i < sizes_.channel_blocks(); ++i) {
            const int64_t begin = i * sizes_.block_channels;
            const int64_t stop = std::min(sizes_.channels, begin + sizes_.block_channels);
            set_scale(range_of(scratch, begin, stop), scale + i * results_.scales.stride_channel,
                      has_zeros() ? zero + i * results_.zero_points->stride_channel : 0, begin,
                      stop, place + i, scratch);
        }
        encode(head, first, end, scratch);
    }

    /// One scale for all: two passes over x.
    void run_one_block() {
        constexpr int64_t rows = 64;
        const int64_t of_head = (sizes_.rows + rows - 1) / rows;
        std::vector<QuantRange> ranges(static_cast<size_t>(sizes_.batch * sizes_.heads * of_head),
                                       QuantRange{0, 0, 0});
        for_row_blocks(sizes_, of_head, rows, [&](const Head& head, int64_t first, int64_t end) {
            Scratch scratch(room_);
            for (int64_t i = first; i < end; ++i) {
                measure(head, i * rows, std::min(sizes_.rows, (i + 1) * rows), scratch);
                const int64_t place = (head.batch * sizes_.heads + head.head) * of_head + i;
                ranges[static_cast<size_t>(place)] = range_of(scratch, 0, sizes_.channels);
            }
        });
        QuantRange all{0, 0, 0};
        for (const QuantRange& range : ranges) all = widened(all, range);
        {
            Scratch scratch(room_);
            set_scale(all, 0, 0, 0, 1, 0, scratch);
        }
        for_row_blocks(sizes_, of_head, rows, [&](const Head& head, int64_t first, int64_t end) {
            Scratch scratch(room_);
            set_known_scale(scratch);
            encode(head, first * rows, std::min(sizes_.rows, end * rows), scratch);
        });
    }

    /// The one scale, as set_scale() has written it, for all channels.
    void set_known_scale(Scratch& scratch) const {
        const float value = quant_scale(format_.scale_kind(), bits_at(results_.scales, 0));
        scratch.poisoned = value != value;
        const float zero = has_zeros() ? static_cast<float>(bits_at(*results_.zero_points, 0)) : 0;
        std::fill_n(scratch.scales.scale, sizes_.channels, value);
        std::fill_n(scratch.scales.inverse, sizes_.channels,
                    value == 0 || scratch.poisoned ? 0.f : 1.f / value);
        std::fill_n(scratch.scales.offset, sizes_.channels, zero);
    }

    void refuse_nonfinite() const {
        const int64_t place = std::min(nonfinite_.load(), too_large_.load());
        if (place != none) problem_.refuse(place, place != nonfinite_.load());
    }

    static constexpr int64_t none = std::numeric_limits<int64_t>::max();

    const QuantizeProblem& problem_;
    const QuantizeResults& results_;
    const QuantSizes& sizes_;
    const QuantFormat& format_;
    const int codes_;
    const CombineKernel& load_;
    const QuantKernel& kernel_;
    const int64_t room_;
    std::atomic<int64_t> nonfinite_{none}, too_large_{none};  // the first such block
};

}  // namespace

void run_quantize(const QuantizeProblem& problem, const QuantizeResults& results) {
    const DefaultFloatEnvironment environment;
    Quantizer(problem, results).run();
}

void run_dequantize(const DequantizeProblem& problem, const DequantizeResults& results) {
    const DefaultFloatEnvironment environment;
    const QuantOperand& operand = problem.operand;
    const QuantSizes& sizes = operand.sizes;
    const CombineKernel& store = kernels_for(kernels(), problem.out_dtype).combine;
    const QuantKernel& kernel = quant_kernel(kernels());
    const Codes codes = codes_of(operand);
    const int64_t room = sizes.channels + lanes;
    for_row_blocks(sizes, sizes.rows, 1, [&](const Head& head, int64_t first, int64_t end) {
        float* row = thread_scratch(room);
        std::fill_n(row, room, 0.f);
        for (int64_t i = first; i < end; ++i) {
            kernel.numbers(codes, address(operand.data, head.offset(operand.data, i)), head.batch,
                           head.head, i, sizes.channels, row);
            store.store(row, sizes.channels, address(results.out, head.offset(results.out, i)),
                        results.out.stride_channel);
        }
    });
}

}  // namespace umfa::cpu
