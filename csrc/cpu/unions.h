// Zips inside unions of blocks, which have nothing in common but each model's budget.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/kernels.h"

namespace mudsc {

struct ZipUnions {
    ZipArgs each;  // what all have in common; units, model_of, owner and budgets are not looked at
    int64_t count;
    const int64_t* units;     // [count, n]
    const int32_t* model_of;  // [count, n]
    int64_t* owner;           // [count, n] out
    int64_t* budget;       // [models] merges left inside each model; lowered as the unions spend them, in their order
    int64_t block_budget;  // the same for each model in one union alone
    std::vector<double> total;  // out, by union: sum of the entries taken
    std::vector<int64_t> made;  // out: merges made; ends with the first union that has no allowed pair left
};

// Results are those of one union after another, whatever the number of threads.
Status zip_unions(const KernelTable& table, ZipUnions& all);

}  // namespace mudsc
