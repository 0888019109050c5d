// Chooses, once, which set of kernels runs on this CPU.
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace mudsc {

// The build names the instruction sets: MUDSC_FAST_ISAS is to X(baseline) X(avx2) ...
#define X(isa)                  \
    namespace isa {             \
    const KernelTable& table(); \
    }
MUDSC_FAST_ISAS
#undef X

namespace {

using TableFn = const KernelTable& (*)();

struct Entry {
    const char* name;
    TableFn table;
};

const Entry entries[] = {
#define X(isa) {#isa, &isa::table},
    MUDSC_FAST_ISAS
#undef X
};
constexpr int entry_count = sizeof entries / sizeof entries[0];

bool cpu_runs(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    if (strcmp(name, "avx2") == 0) return avx2;
    if (strcmp(name, "avx512") == 0) return avx512;
    if (strcmp(name, "avx512_bf16") == 0)
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
    (void)name;
#endif
    return true;
}

const KernelTable* find(const char* name) {
    std::string known;
    for (const Entry& entry : entries) {
        if (strcmp(entry.name, name) == 0) {
            if (!cpu_runs(name))
                throw std::runtime_error("instruction set '" + std::string(name) + "' cannot run on this CPU");
            return &entry.table();
        }
        known += (known.empty() ? "" : ", ") + std::string(entry.name);
    }
    throw std::invalid_argument("unknown instruction set '" + std::string(name) + "'; this build has " + known);
}

const KernelTable* choose() {
    const char* forced = getenv("MUDSC_FAST_ISA");
    if (forced != nullptr && forced[0] != '\0') return find(forced);
    for (int i = entry_count - 1; i > 0; --i) {
        if (cpu_runs(entries[i].name)) return &entries[i].table();
    }
    return &entries[0].table();
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
    const KernelTable* table = current.load(std::memory_order_acquire);
    if (table == nullptr) {
        table = choose();
        current.store(table, std::memory_order_release);
    }
    return *table;
}

void use_isa(const char* name) { current.store(name == nullptr ? choose() : find(name)); }
int isa_count() { return entry_count; }
const char* isa_name(int index) { return entries[index].name; }
bool isa_usable(int index) { return cpu_runs(entries[index].name); }

}  // namespace mudsc
