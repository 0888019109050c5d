// The merged tensor of several models in one pass (docs/method.md rule 9): each row of the result is gathered from
// every model in merged coordinates, averaged, scaled and written, while it is in the L1.
#include "cpu/common.h"
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Elements of the result that one task writes at least: below, handing it out costs more.
constexpr int64_t kTask = 1 << 15;

template <typename W, typename T>
inline W load(T x) {
    return static_cast<W>(to_f32(x));
}
template <>
inline double load<double, double>(double x) {
    return x;
}

template <typename T, typename W>
inline T store(W x) {
    return from_f32<T>(static_cast<float>(x));
}
template <>
inline double store<double, double>(double x) {
    return x;
}

// to[j * N + c] = sum over the members q of j of from[q * N + c]; N 0: `inner`. Only one member each where Single.
template <int N, bool Single, typename W, typename T>
void gather(const T* from, const MergeAxis& axis, int64_t m, int64_t inner, W* __restrict to) {
    const int64_t n = N > 0 ? N : inner, *ptr = axis.ptr + m * (axis.size + 1);
    const int64_t* members = axis.members + m * axis.positions;
    for (int64_t j = 0; j < axis.size; ++j, to += n) {
        const int64_t first = Single ? j : ptr[j], last = Single ? j + 1 : ptr[j + 1];
        if (!Single && first == last) {
            for (int64_t c = 0; c < n; ++c) to[c] = 0;
        }
        for (int64_t p = first; p < last; ++p) {
            const T* x = from + members[p] * n;
            if (p > first) {
                for (int64_t c = 0; c < n; ++c) to[c] += load<W>(x[c]);
            } else {
                for (int64_t c = 0; c < n; ++c) to[c] = load<W>(x[c]);
            }
        }
    }
}

template <typename W, typename T>
void gather_row(const T* from, const MergeAxis& axis, int64_t m, int64_t inner, W* to) {
    const bool single = axis.single[m] != 0;
    if (inner == 1) {
        single ? gather<1, true>(from, axis, m, inner, to) : gather<1, false>(from, axis, m, inner, to);
    } else if (inner == 9) {  // the kernels of most convolutions
        single ? gather<9, true>(from, axis, m, inner, to) : gather<9, false>(from, axis, m, inner, to);
    } else {
        single ? gather<0, true>(from, axis, m, inner, to) : gather<0, false>(from, axis, m, inner, to);
    }
}

template <typename A, typename B>
struct Same {
    static constexpr bool value = false;
};
template <typename A>
struct Same<A, A> {
    static constexpr bool value = true;
};

template <typename T, typename W>
class Merger {
  public:
    explicit Merger(const MergeArgs& args)
        : a_(args),
          rows_(a_.outer * a_.first.size),
          length_(a_.second.size * a_.inner),
          row_(a_.middle * length_),
          from_row_(a_.middle * a_.second.positions * a_.inner) {
        for (int64_t m = 0; m < a_.models; ++m) {
            if (a_.shares[m] != 0) last_ = m;
        }
    }

    Status run() {
        const int64_t each = max64(1, kTask / max64(row_, 1)), tasks = ceil_div(rows_, each);
        // One model's part, the mean so far, the scale of a row, and a sum of rows, for each worker.
        const int64_t room = 3 * length_ + a_.second.positions * a_.inner;
        Buffer<W> scratch(max64(a_.threads, 1) * room);
        Buffer<uint8_t> finite(tasks);
        if (!scratch || !finite) return Status::no_memory;
        SharedPoll poll(a_.poll);
        parallel_each(a_.threads, tasks, poll, [&](int64_t task, int worker, const Poll& stop) {
            if (stop()) return;
            W* own = scratch.get() + worker * room;
            const int64_t begin = task * each, end = min64(begin + each, rows_);
            ask_for_pages(static_cast<T*>(a_.out) + begin * row_, (end - begin) * row_);
            bool good = true;
            for (int64_t r = begin; r < end; ++r) good &= merge_row(r, own);
            finite[task] = good;
        });
        if (poll.stopped()) return Status::interrupted;
        for (int64_t t = 0; t < tasks; ++t) {
            if (!finite[t]) return Status::not_finite;
        }
        return Status::ok;
    }

  private:
    bool merge_row(int64_t r, W* scratch) const {
        const int64_t o = r / a_.first.size, j = r % a_.first.size;
        W *part = scratch, *kept = scratch + length_, *scale = scratch + 2 * length_, *whole = scratch + 3 * length_;
        const bool scaled = scales(j, scale);
        bool finite = true;
        for (int64_t b = 0; b < a_.middle; ++b) {
            T* to = static_cast<T*>(a_.out) + r * row_ + b * length_;
            const W* mean = nullptr;  // of the models so far
            double total = 0;
            bool written = false;
            for (int64_t m = 0; m < a_.models; ++m) {
                if (a_.shares[m] == 0) continue;
                total += a_.shares[m];
                const W* x = expressed(o, j, b, m, mean == nullptr ? kept : part, whole);
                if (mean == nullptr) {
                    if (x == whole) memcpy(kept, x, static_cast<size_t>(length_) * sizeof(W));
                    mean = x == whole ? kept : x;
                } else if (m == last_ && !scaled) {
                    finite &= mix(mean, x, a_.shares[m] / total, to);
                    written = true;
                } else {
                    mix(mean, x, a_.shares[m] / total, kept);
                    mean = kept;
                }
            }
            if (!written) finite &= write(mean, scaled ? scale : nullptr, to);
        }
        return finite;
    }

    // One model's row in merged coordinates: where it is, if nothing has to be done to it. Members of the first axis
    // are summed before those of the second, as one regroup after the other does it.
    const W* expressed(int64_t o, int64_t j, int64_t b, int64_t m, W* part, W* whole) const {
        const MergeAxis &rows = a_.first, &columns = a_.second;
        const int64_t* ptr = rows.ptr == nullptr ? nullptr : rows.ptr + m * (rows.size + 1);
        const int64_t* members = rows.ptr == nullptr ? nullptr : rows.members + m * rows.positions;
        const int64_t count = ptr == nullptr ? 1 : ptr[j + 1] - ptr[j], length = columns.positions * a_.inner;
        const T* data = static_cast<const T*>(a_.data[m]) + o * rows.positions * from_row_ + b * length;
        if (count == 1) {
            const T* x = data + (ptr == nullptr ? j : members[ptr[j]]) * from_row_;
            if (columns.ptr != nullptr && columns.single[m] != kInOrder) {
                gather_row(x, columns, m, a_.inner, part);
                return part;
            }
            if constexpr (Same<T, W>::value) return x;
            for (int64_t k = 0; k < length; ++k) part[k] = load<W>(x[k]);
            return part;
        }
        for (int64_t k = 0; k < length; ++k) whole[k] = 0;
        for (int64_t p = 0; p < count; ++p) {
            const T* x = data + members[ptr[j] + p] * from_row_;
            for (int64_t k = 0; k < length; ++k) whole[k] += load<W>(x[k]);
        }
        if (columns.ptr == nullptr) return whole;
        gather_row(static_cast<const W*>(whole), columns, m, a_.inner, part);
        return part;
    }

    // to = mean + weight * (x - mean), such that equal values stay what they are: in the roundings of torch's lerp, so
    // that a tensor that is merged by it has the same bits. Like write, returns whether all of it is finite.
    template <typename To>
    bool mix(const W* mean, const W* x, double weight, To* to) const {
        const W w = static_cast<W>(weight);
        if (w == W(0.5)) {  // products with 0.5 are exact
            return each([&](int64_t k) { return x[k] - (x[k] - mean[k]) * w; }, to);
        }
        if (w < W(0.5)) return each([&](int64_t k) { return fused(w, x[k] - mean[k], mean[k]); }, to);
        return each([&](int64_t k) { return fused(w - W(1), x[k] - mean[k], x[k]); }, to);
    }

    bool write(const W* mean, const W* scale, T* to) const {
        if (scale != nullptr) return each([&](int64_t k) { return mean[k] * scale[k]; }, to);
        return each([&](int64_t k) { return mean[k]; }, to);
    }

    template <typename Value, typename To>
    bool each(const Value& value, To* to) const {
        unsigned bad = 0;
        for (int64_t k = 0; k < length_; ++k) {
            const W x = value(k);
            bad |= x - x != 0;
            to[k] = store<To>(x);
        }
        return bad == 0;
    }
    static float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

    // The shares of all models over those of the members of each entry, where axes are produced: false if 1 everywhere.
    bool scales(int64_t j, W* scale) const {
        if (!a_.first.out && !a_.second.out) return false;
        bool any = false;
        for (int64_t k = 0; k < a_.second.size; ++k) {
            double members = 0, total = 0;
            for (int64_t m = 0; m < a_.models; ++m) {
                const double count = count_of(a_.first, m, j) * count_of(a_.second, m, k);
                members += a_.shares[m] * count;
                total += a_.shares[m];
            }
            const W by = members > 0 ? static_cast<W>(total / members) : W(0);
            any |= by != 1;
            for (int64_t c = 0; c < a_.inner; ++c) scale[k * a_.inner + c] = by;
            if (!a_.second.out) {
                if (!any) return false;
                for (int64_t i = 0; i < length_; ++i) scale[i] = by;
                return true;
            }
        }
        return any;
    }

    static double count_of(const MergeAxis& axis, int64_t m, int64_t j) {
        if (!axis.out || axis.ptr == nullptr) return 1;
        const int64_t* ptr = axis.ptr + m * (axis.size + 1);
        return static_cast<double>(ptr[j + 1] - ptr[j]);
    }

    const MergeArgs& a_;
    const int64_t rows_, length_, row_, from_row_;
    int64_t last_ = 0;  // model that counts
};

}  // namespace

Status merge(const MergeArgs& args);
Status merge(const MergeArgs& args) {
    switch (args.dtype) {
        case Dtype::f64: return Merger<double, double>(args).run();
        case Dtype::f32: return Merger<float, float>(args).run();
        case Dtype::f16: return Merger<f16, float>(args).run();
        case Dtype::bf16: return Merger<bf16, float>(args).run();
        default: return Status::unsupported;
    }
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
