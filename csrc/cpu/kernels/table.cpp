// Compiled once for each instruction set: gathers that set's kernels in a table.
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {

Status regroup(const RegroupArgs& args);
Status zip(const ZipArgs& args);
Status assign(const AssignArgs& args);
double peak_f32(int64_t iterations, float* sink);
double peak_bf16(int64_t iterations, float* sink);

extern const KernelTable kTable;
const KernelTable kTable = {MUDSC_ISA_NAME, regroup, zip, assign, peak_f32, peak_bf16};

const KernelTable& table();
const KernelTable& table() { return kTable; }

}  // namespace MUDSC_ISA
}  // namespace mudsc
