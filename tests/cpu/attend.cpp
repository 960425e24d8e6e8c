// Runs problems through the C interface, for machines without a Python of their own.
//
//   attend isa                the instruction set in use
//   attend < problems > results
//
// A problem: a `Header`, then query, key, value (BSHD) and the slopes, if any, end to end.
// Its result: out, then the log-sum-exp. One after the other until the input ends.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/isa/select.h"
#include "umfa/umfa.h"

namespace {

struct Header {
    int64_t code, bits;  // DLDataType
    int64_t batch, heads, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v;
    int64_t causal, left, right;
    int64_t slopes;  // dimensions; 0: none
    double scale, softcap;
};

struct Tensor {
    std::vector<int64_t> shape;
    std::vector<char> bytes;
    DLTensor view;

    Tensor(DLDataType dtype, std::vector<int64_t> sizes) : shape(sizes), view{} {
        size_t size = dtype.bits / 8;
        for (const int64_t n : shape) size *= static_cast<size_t>(n);
        bytes.resize(size);
        view.data = bytes.data();
        view.device.device_type = kDLCPU;
        view.ndim = static_cast<int32_t>(shape.size());
        view.dtype = dtype;
        view.shape = shape.data();
    }
    Tensor(const Tensor&) = delete;

    bool read() { return std::fread(bytes.data(), 1, bytes.size(), stdin) == bytes.size(); }
    void write() const { std::fwrite(bytes.data(), 1, bytes.size(), stdout); }
};

bool run(const Header& h) {
    const DLDataType dtype{static_cast<uint8_t>(h.code), static_cast<uint8_t>(h.bits), 1};
    const DLDataType float32{kDLFloat, 32, 1};
    Tensor query(dtype, {h.batch, h.seqlen_q, h.heads, h.head_dim});
    Tensor key(dtype, {h.batch, h.seqlen_kv, h.heads_kv, h.head_dim});
    Tensor value(dtype, {h.batch, h.seqlen_kv, h.heads_kv, h.head_dim_v});
    Tensor out(dtype, {h.batch, h.seqlen_q, h.heads, h.head_dim_v});
    Tensor lse(float32, {h.batch, h.heads, h.seqlen_q});
    Tensor slopes(float32, h.slopes == 2 ? std::vector<int64_t>{h.batch, h.heads}
                                         : std::vector<int64_t>{h.heads});
    if (!query.read() || !key.read() || !value.read()) return false;
    if (h.slopes != 0 && !slopes.read()) return false;

    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    options.causal = h.causal;
    options.window_size_left = h.left;
    options.window_size_right = h.right;
    options.softmax_scale = h.scale;
    options.softcap = h.softcap;
    if (h.slopes != 0) options.alibi_slopes = &slopes.view;
    if (umfa_attention_forward(&query.view, &key.view, &value.view, &out.view, &lse.view,
                               &options) != UMFA_OK) {
        std::fprintf(stderr, "%s\n", umfa_last_error());
        return false;
    }
    out.write();
    lse.write();
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2 && !std::strcmp(argv[1], "isa")) {
        std::puts(umfa::cpu::isa_in_use().c_str());
        return 0;
    }
    Header header;
    while (std::fread(&header, sizeof header, 1, stdin) == 1)
        if (!run(header)) return 1;
    return 0;
}
