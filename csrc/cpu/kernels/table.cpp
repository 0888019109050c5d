// Compiled once for each instruction set: gathers that set's kernels in a table.
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {

Status regroup(const RegroupArgs& args);
Status zip(const ZipArgs& args);
Status assign(const AssignArgs& args);
Status assign_tile(const AssignTileArgs& args);
Status assign_lists(const AssignListsArgs& args);
Status covariance_update(const CovarianceUpdateArgs& args);
Status covariance_flush(CovarianceState& state, int threads);
Status covariance_merge(const CovarianceMergeArgs& args);
Status covariance_rebase(CovarianceState& state, const double* shift, const double* scale, int threads);
Status similarity(const SimilarityArgs& args);
Status merge(const MergeArgs& args);
double peak_f32(int64_t iterations, float* sink);
double peak_bf16(int64_t iterations, float* sink);

extern const KernelTable kTable;
const KernelTable kTable = {MUDSC_ISA_NAME,
                            regroup,
                            zip,
                            assign,
                            assign_tile,
                            assign_lists,
                            peak_f32,
                            peak_bf16,
                            covariance_update,
                            covariance_flush,
                            covariance_merge,
                            covariance_rebase,
                            similarity,
                            merge};

const KernelTable& table();
const KernelTable& table() { return kTable; }

}  // namespace MUDSC_ISA
}  // namespace mudsc
