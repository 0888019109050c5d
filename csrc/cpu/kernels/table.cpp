// Compiled once for each instruction set: gathers that set's kernels in a table.
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {

Status regroup(const RegroupArgs& args);
Status zip(const ZipArgs& args);

extern const KernelTable kTable;
const KernelTable kTable = {MUDSC_ISA_NAME, regroup, zip};

const KernelTable& table();
const KernelTable& table() { return kTable; }

}  // namespace MUDSC_ISA
}  // namespace mudsc
