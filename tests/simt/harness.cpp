// Runs cases through the launchers on the emulator. Reads a file of cases, writes a file of results:
//   case: int64 lengths and contents of: settings, integers, reals, then the number of arrays and each array's bytes
//   result: error text, then the number of arrays and each array's bytes
// Every array is a block of memory of its own, exactly as long as it is, so that the sanitizers see each step beyond
// it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda_runtime.h"
#include "simt.h"
#include "toys.h"

namespace {

constexpr int kInputArrays = 8;

struct Memory {
    char* data = nullptr;
    int64_t bytes = 0;
    explicit Memory(int64_t n) : bytes(n) {
        void* p = nullptr;
        if (posix_memalign(&p, 256, n == 0 ? 1 : static_cast<size_t>(n)) != 0) exit(71);
        memset(p, 0xff, static_cast<size_t>(n));
        data = static_cast<char*>(p);
    }
    Memory(Memory&& other) noexcept : data(other.data), bytes(other.bytes) { other.data = nullptr; }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { free(data); }
    template <typename T>
    T* as() const {
        return bytes == 0 ? nullptr : reinterpret_cast<T*>(data);
    }
};

struct Case {
    std::vector<int64_t> settings, integers;
    std::vector<double> reals;
    std::vector<Memory> arrays;
    size_t next = 0;
    int64_t take() { return integers.at(next++); }
    const int64_t* take(int64_t n) {
        next += static_cast<size_t>(n);
        return integers.data() + next - n;
    }
};

FILE *input, *output;

bool read_raw(void* to, size_t bytes) { return bytes == 0 || fread(to, bytes, 1, input) == 1; }
int64_t read_length() {
    int64_t n = 0;
    if (!read_raw(&n, sizeof(n))) exit(72);
    return n;
}
template <typename T>
std::vector<T> read_vector() {
    std::vector<T> v(static_cast<size_t>(read_length()));
    if (!read_raw(v.data(), v.size() * sizeof(T))) exit(72);
    return v;
}
void write_raw(const void* from, size_t bytes) {
    const int64_t n = static_cast<int64_t>(bytes);
    fwrite(&n, sizeof(n), 1, output);
    if (bytes > 0) fwrite(from, bytes, 1, output);
}

std::string run_regroup(Case& c) {
    mudsc::RegroupArgs a{};
    a.dtype = static_cast<mudsc::Dtype>(c.take());
    a.element_bytes = static_cast<int>(c.take());
    a.ndim = static_cast<int>(c.take());
    a.dim = static_cast<int>(c.take());
    const bool single = c.take() != 0;
    const int64_t length = c.take(), in_offset = c.take(), out_offset = c.take();
    a.shape = c.take(a.ndim);
    a.in_strides = c.take(a.ndim);
    a.out_strides = c.take(a.ndim);
    a.in = c.arrays[0].data + in_offset * a.element_bytes;
    a.out = c.arrays[1].data + out_offset * a.element_bytes;
    a.ptr = c.arrays[2].as<int64_t>();
    a.members = c.arrays[3].as<int64_t>();
    a.scale = c.arrays[4].as<double>();
    return mudsc::cuda::regroup(a, length, single, simt::options().device, nullptr);
}

std::string run_zip(Case& c) {
    mudsc::cuda::ZipCudaArgs a{};
    a.zip.dtype = static_cast<mudsc::Dtype>(c.take());
    a.zip.n = c.take();
    a.zip.models = static_cast<int>(c.take());
    a.zip.merges = c.take();
    a.problems = c.take();
    a.zip.row_stride = c.take();
    a.zip.col_stride = c.take();
    a.zip.attenuation = c.reals.at(0);
    a.zip.similarity = c.arrays[0].data;
    a.zip.units = c.arrays[1].as<int64_t>();
    a.zip.model_of = c.arrays[2].as<int32_t>();
    a.zip.budget = c.arrays[3].as<int64_t>();
    a.zip.block_budget = c.arrays[4].as<int64_t>();
    a.zip.owner = c.arrays[5].as<int64_t>();
    a.zip.total = c.arrays[6].as<double>();
    a.zip.made = c.arrays[7].as<int64_t>();
    a.status = c.arrays[8].as<int32_t>();
    a.steps_a_launch = c.take();
    int64_t polls = c.take();  // the one that says stop; 0: none
    const auto stop = [](void* left) { return --*static_cast<int64_t*>(left) == 0; };
    a.zip.poll = mudsc::Poll{stop, &polls};
    const Memory scratch(mudsc::cuda::zip_scratch_bytes(a) - c.take());
    a.scratch = scratch.data;
    a.scratch_bytes = scratch.bytes;
    return mudsc::cuda::zip(a, simt::options().device, nullptr);
}

std::string run_assign(Case& c) {
    mudsc::AssignArgs a{};
    a.dtype = static_cast<mudsc::Dtype>(c.take());
    a.n = c.take();
    for (int d = 0; d < 2; ++d) a.shape[d] = c.take();
    for (int d = 0; d < 2; ++d) a.strides[d] = c.take();
    a.row_stride = c.take();
    a.col_stride = c.take();
    const int64_t problems = a.shape[0] * a.shape[1];
    a.similarity = c.arrays[0].data;
    a.start = c.arrays[1].as<double>();
    a.indices = c.arrays[2].as<int64_t>();
    a.value = c.arrays[3].as<double>();
    a.gap = a.value + problems;
    a.u = a.gap + problems;
    a.v = a.u + problems * a.n;
    return mudsc::cuda::assign(a, c.arrays[4].as<int32_t>(), simt::options().device, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 73;
    input = fopen(argv[1], "rb");
    output = fopen(argv[2], "wb");
    if (input == nullptr || output == nullptr) return 74;
    const int64_t cases = read_length();
    for (int64_t n = 0; n < cases; ++n) {
        Case c;
        c.settings = read_vector<int64_t>();  // op, seed, policy, multiprocessors, mutant, fail code, device
        c.integers = read_vector<int64_t>();
        c.reals = read_vector<double>();
        std::vector<char> fail_call = read_vector<char>();
        fail_call.push_back('\0');
        const int64_t arrays = read_length();
        for (int64_t k = 0; k < arrays; ++k) {
            Memory m(read_length());
            if (!read_raw(m.data, static_cast<size_t>(m.bytes))) return 72;
            c.arrays.push_back(std::move(m));
        }
        simt::Options& o = simt::options();
        o.seed = static_cast<uint64_t>(c.settings.at(1));
        o.policy = static_cast<int>(c.settings.at(2));
        o.multiprocessors = static_cast<int>(c.settings.at(3));
        o.mutant = static_cast<int>(c.settings.at(4));
        o.fail_code = static_cast<int>(c.settings.at(5));
        o.device = static_cast<int>(c.settings.at(6));
        o.fail_call = fail_call.size() > 1 ? fail_call.data() : nullptr;
        std::string error;
        switch (c.settings.at(0)) {
            case 0: error = run_regroup(c); break;
            case 1: error = run_zip(c); break;
            case 2: error = run_assign(c); break;
            default: error = run_toy(static_cast<int>(c.take()), c.arrays[0].as<int>()); break;
        }
        int now = 0;
        if (cudaGetDevice(&now) == cudaSuccess && now != 0) error += "; another device is left in use";
        write_raw(error.data(), error.size());
        fwrite(&arrays, sizeof(arrays), 1, output);
        for (const Memory& m : c.arrays) write_raw(m.data, static_cast<size_t>(m.bytes));
    }
    printf("%llu steps\n", static_cast<unsigned long long>(simt::steps()));
    return fclose(output) == 0 ? 0 : 75;
}
