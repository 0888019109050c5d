// Turns a strided tensor, seen as (units, columns), into the offsets that the similarity kernel reads: some of its axes
// are the units, some are expressed in merged coordinates by labels, all others are columns as they are.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace mudsc {

// Axes of a tensor that are expressed in merged coordinates: entry i of their row-major index belongs to merged unit
// labels[i], and merged unit j is multiplied by scale[j].
struct LabelledAxes {
    std::vector<int> dims;
    const int64_t* labels;
    int64_t size;         // merged units
    const double* scale;  // [size] or null
};

class TermTable {
  public:
    TermTable(const int64_t* shape, const int64_t* strides, int ndim, const std::vector<int>& unit_dims,
              const std::vector<LabelledAxes>& labelled) {
        std::vector<char> used(static_cast<size_t>(ndim), 0);
        for (int d : unit_dims) used[static_cast<size_t>(d)] = 1;
        for (const LabelledAxes& axes : labelled) {
            for (int d : axes.dims) used[static_cast<size_t>(d)] = 1;
        }
        std::vector<int> plain;
        for (int d = 0; d < ndim; ++d) {
            if (used[static_cast<size_t>(d)] == 0) plain.push_back(d);
        }
        unit_off_ = offsets(shape, strides, unit_dims);
        if (labelled.empty()) {
            off_ = offsets(shape, strides, plain);
        } else {
            group(shape, strides, labelled, plain);
        }
    }

    void fill(SimilarityTerm& term) const {
        term.unit_off = unit_off_.data();
        term.columns = static_cast<int64_t>(ptr_.empty() ? off_.size() : ptr_.size() - 1);
        term.off = off_.data();
        term.ptr = ptr_.empty() ? nullptr : ptr_.data();
        term.scale = scale_.empty() ? nullptr : scale_.data();
    }
    int64_t units() const { return static_cast<int64_t>(unit_off_.size()); }

  private:
    // Offsets of all indices of some dims, row-major.
    static std::vector<int64_t> offsets(const int64_t* shape, const int64_t* strides, const std::vector<int>& dims) {
        std::vector<int64_t> result{0};
        for (int d : dims) {
            std::vector<int64_t> longer(result.size() * static_cast<size_t>(shape[d]));
            int64_t* to = longer.data();
            for (int64_t base : result) {
                for (int64_t i = 0; i < shape[d]; ++i) *to++ = base + i * strides[d];
            }
            result.swap(longer);
        }
        return result;
    }

    // Sorts the members of merged columns by column. Columns vary in the order of the tensor's dims, so that the last
    // ones, which lie side by side, stay together.
    void group(const int64_t* shape, const int64_t* strides, const std::vector<LabelledAxes>& labelled,
               const std::vector<int>& plain) {
        std::vector<LabelledAxes> axes_in_order = labelled;
        for (int d : plain) axes_in_order.push_back({{d}, nullptr, shape[d], nullptr});
        std::sort(axes_in_order.begin(), axes_in_order.end(),
                  [](const LabelledAxes& a, const LabelledAxes& b) { return a.dims[0] < b.dims[0]; });
        if (reorder(shape, strides, axes_in_order)) return;
        std::vector<int64_t> members{0}, columns{0};
        std::vector<double> scale{1.0};
        for (const LabelledAxes& axes : axes_in_order) {
            const std::vector<int64_t> steps = offsets(shape, strides, axes.dims);
            const size_t count = steps.size(), size = static_cast<size_t>(axes.size);
            std::vector<int64_t> more_members(members.size() * count), more_columns(members.size() * count);
            std::vector<double> more_scale(scale.size() * size);
            for (size_t i = 0; i < members.size(); ++i) {
                int64_t *to_members = more_members.data() + i * count, *to_columns = more_columns.data() + i * count;
                const int64_t member = members[i], column = columns[i] * axes.size;
                for (size_t k = 0; k < count; ++k) to_members[k] = member + steps[k];
                for (size_t k = 0; k < count; ++k)
                    to_columns[k] = column + (axes.labels != nullptr ? axes.labels[k] : static_cast<int64_t>(k));
            }
            for (size_t i = 0; i < scale.size(); ++i) {
                for (size_t j = 0; j < size; ++j)
                    more_scale[i * size + j] = axes.scale != nullptr ? scale[i] * axes.scale[j] : scale[i];
            }
            members.swap(more_members);
            columns.swap(more_columns);
            scale.swap(more_scale);
        }
        bool scaled = false;
        for (double s : scale) scaled |= s != 1.0;
        std::vector<int64_t> ptr(scale.size() + 1, 0);
        for (int64_t c : columns) ++ptr[static_cast<size_t>(c) + 1];
        bool single = true;
        for (size_t c = 1; c < ptr.size(); ++c) {
            single = single && ptr[c] == 1;
            ptr[c] += ptr[c - 1];
        }
        off_.resize(members.size());
        std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
        for (size_t i = 0; i < members.size(); ++i) {
            off_[static_cast<size_t>(next[static_cast<size_t>(columns[i])]++)] = members[i];
        }
        if (!single) ptr_.swap(ptr);
        if (scaled) scale_.swap(scale);
    }

    // The same where every merged unit has one member and no scale. Returns false where one has not.
    bool reorder(const int64_t* shape, const int64_t* strides, const std::vector<LabelledAxes>& axes_in_order) {
        std::vector<int64_t> result{0}, order;
        for (const LabelledAxes& axes : axes_in_order) {
            const std::vector<int64_t> steps = offsets(shape, strides, axes.dims);
            const size_t count = steps.size();
            order = steps;
            if (axes.labels != nullptr) {
                if (static_cast<int64_t>(count) != axes.size) return false;
                std::vector<char> taken(count, 0);
                for (size_t k = 0; k < count; ++k) {
                    const auto at = static_cast<size_t>(axes.labels[k]);
                    if (taken[at] != 0 || (axes.scale != nullptr && axes.scale[at] != 1.0)) return false;
                    taken[at] = 1;
                    order[at] = steps[k];
                }
            }
            std::vector<int64_t> longer(result.size() * count);
            int64_t* to = longer.data();
            for (int64_t base : result) {
                for (int64_t step : order) *to++ = base + step;
            }
            result.swap(longer);
        }
        off_.swap(result);
        return true;
    }

    std::vector<int64_t> unit_off_, off_, ptr_;  // ptr_ is empty where every column has one member
    std::vector<double> scale_;                  // empty where all are 1
};

}  // namespace mudsc
