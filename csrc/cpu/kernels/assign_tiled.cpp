// Assignment of matrices that are never whole in memory: the best columns of some rows, the largest reduced values of
// some rows, and the solver that works on such lists. Lists are made at some prices and stay useful while those rise,
// as in assign_lists.h; where a row's list can no longer tell, the solver says so and leaves the rest to its caller.
#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/assign_heap.h"
#include "cpu/kernels/assign_lists.h"
#include "cpu/kernels/assign_memory.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kRowsATask = 4;

// What one thread needs for a row.
struct RowScratch {
    ListScratch list;
    double* maxima;  // [sections * kRun]
};

// Columns whose reduced value is among the `room` largest: through the largest values of groups, which bound the level
// from below, so that few columns have to be sorted out.
template <class T>
class Candidates {
  public:
    explicit Candidates(const AssignTileArgs& a) : a_(a), n_(static_cast<int>(a.n)), room_(static_cast<int>(a.room)) {
        const int wanted = room_ > 0 ? (2 * room_ + kRun - 1) / kRun : 1;
        section_ = padded((n_ + wanted - 1) / wanted);
        sections_ = (n_ + section_ - 1) / section_;
    }

    Status run() {
        const int64_t tasks = ceil_div(a_.rows, kRowsATask);
        const int workers = static_cast<int>(max64(1, min64(a_.threads, tasks)));
        Buffer<char> memory;
        Buffer<RowScratch> scratch(workers);
        for (int pass = 0; pass < 2; ++pass) {
            Carver carver(pass == 0 ? nullptr : memory.get());
            carver.take(&price_, padded(n_));
            for (int w = 0; w < workers; ++w) {
                carver.take(&scratch[w].list.columns, n_ + kRun);
                carver.take(&scratch[w].list.r, n_);
                carver.take(&scratch[w].list.copy, n_);
                carver.take(&scratch[w].maxima, static_cast<int64_t>(sections_) * kRun);
            }
            if (pass == 0 && !memory.allocate(carver.used())) return Status::no_memory;
        }
        for (int j = 0; j < padded(n_); ++j) price_[j] = j < n_ ? a_.v[j] : kFar;
        int stop = 0;
        parallel_each(workers, tasks, [&](int64_t task, int worker) {
            if (__atomic_load_n(&stop, __ATOMIC_RELAXED) != 0) return;
            if (worker == 0 && a_.poll()) __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
            for (int64_t i = task * kRowsATask; i < min64(a_.rows, (task + 1) * kRowsATask); ++i) {
                if (!do_row(i, scratch[worker])) __atomic_store_n(&stop, 2, __ATOMIC_RELAXED);
            }
        });
        return stop == 0 ? Status::ok : stop == 2 ? Status::not_finite : Status::interrupted;
    }

  private:
    // False when the row holds NaN or an infinity.
    bool do_row(int64_t i, const RowScratch& scratch) const {
        const T* row = static_cast<const T*>(a_.tile) + i * a_.row_stride;
        bool finite = true;
        for (int q = 0; q < sections_; ++q) {
            const int from = q * section_, length = n_ - from < section_ ? n_ - from : section_;
            group_maxima<true, true>(row + from, price_ + from, length, scratch.maxima + q * kRun, &finite);
        }
        if (!finite) return false;
        if (a_.maxima != nullptr) a_.maxima[i] = largest(scratch.maxima, sections_ * kRun);
        if (room_ > 0) list_row(row, i, scratch);
        return true;
    }

    static double largest(const double* x, int count) {
        double most = x[0];
        for (int k = 1; k < count; ++k) most = x[k] > most ? x[k] : most;
        return most;
    }

    void list_row(const T* row, int64_t i, const RowScratch& scratch) const {
        const ListScratch& list = scratch.list;
        const double level = kth_largest(scratch.maxima, sections_ * kRun, room_);
        int found = columns_above<true>(row, price_, n_, level, 0, n_, list.columns);
        double threshold = -kFar;
        if (found < n_) threshold = level;
        if (found > room_) {
            const uint32_t turn = static_cast<uint32_t>(a_.first_row + i) * 40503u;
            threshold = cut(row, found, turn, list);
            found = room_;
        }
        for (int k = 0; k < room_; ++k) {
            a_.columns[i * room_ + k] = list.columns[k];
            a_.values[i * room_ + k] = static_cast<double>(row[list.columns[k]]);
        }
        a_.threshold[i] = threshold;
    }

    // The best `room` of too many columns, equal ones from a place that differs from row to row; returns a bound on
    // the others.
    double cut(const T* row, int found, uint32_t turn, const ListScratch& s) const {
        for (int k = 0; k < found; ++k) {
            s.copy[k] = s.r[k] = static_cast<double>(row[s.columns[k]]) - price_[s.columns[k]];
        }
        const double at = kth_largest(s.copy, found, room_);
        int above = 0, kept = 0;
        for (int k = 0; k < found; ++k) above += s.r[k] > at ? 1 : 0;
        // The equal ones first, while all columns are still there; their numbers replace the values no longer needed.
        int32_t* equal = reinterpret_cast<int32_t*>(s.copy);
        for (int k = static_cast<int>(turn % static_cast<uint32_t>(found)); kept < room_ - above;
             k = k + 1 == found ? 0 : k + 1) {
            if (s.r[k] == at) equal[kept++] = s.columns[k];
        }
        int next = 0;
        for (int k = 0; k < found; ++k) {
            if (s.r[k] > at) s.columns[next++] = s.columns[k];
        }
        for (int k = 0; k < kept; ++k) s.columns[next++] = equal[k];
        return at;
    }

    const AssignTileArgs& a_;
    const int n_, room_;
    int section_ = 0, sections_ = 0;
    double* price_ = nullptr;  // [padded(n)]
};

// The matching that grows on the lists.
class ListSolver {
  public:
    explicit ListSolver(const AssignListsArgs& a) : a_(a), n_(static_cast<int>(a.n)) {}

    Status run() {
        if (!allocate()) return Status::no_memory;
        begin();
        Status status = reduce_rows();
        int left = 0;
        for (int f = 0; f < free_count_ && status == Status::ok; ++f) {
            bool matched = false;
            status = augment(free_[f], &matched);
            if (!matched) free_[left++] = free_[f];
        }
        *a_.free_rows = left;
        return status;
    }

  private:
    struct Best {
        double first, second;
        int64_t at;  // of the first; -1: the list cannot tell
    };

    bool allocate() {
        for (int pass = 0; pass < 2; ++pass) {
            Carver memory(pass == 0 ? nullptr : memory_.get());
            memory.take(&owner_, n_);
            memory.take(&taken_, n_);
            memory.take(&free_, n_);
            memory.take(&length_, n_);
            memory.take(&from_, n_);
            memory.take(&from_at_, n_);
            memory.take(&done_, n_);
            memory.take(&touched_, n_);
            memory.take(&level_, n_);
            heap_.carve(memory, 2 * static_cast<int64_t>(n_));
            if (pass == 0 && !memory_.allocate(memory.used())) return false;
        }
        return true;
    }

    // The matching as it was left; a row whose column is no longer on its list, or no longer its best, is freed.
    void begin() {
        free_count_ = 0;
        for (int j = 0; j < n_; ++j) {
            owner_[j] = -1;
            length_[j] = kFar;
            done_[j] = 0;
        }
        for (int i = 0; i < n_; ++i) {
            a_.wanted[i] = 0;
            const int64_t j = a_.column_of[i];
            int64_t at = -1;
            for (int64_t k = a_.ptr[i]; j >= 0 && k < a_.ptr[i + 1]; ++k) at = a_.columns[k] == j ? k : at;
            if (at >= 0 && owner_[j] < 0) {
                take(i, at);
            } else {
                a_.column_of[i] = -1;
                free_[free_count_++] = i;
            }
        }
    }

    void take(int i, int64_t at) {
        const int j = a_.columns[at];
        if (owner_[j] >= 0) a_.column_of[owner_[j]] = -1;
        owner_[j] = i;
        a_.column_of[i] = j;
        taken_[i] = a_.values[at];
    }

    Best best_of(int i) const {
        double first = -kFar, second = -kFar;
        int64_t at = -1;
        for (int64_t k = a_.ptr[i]; k < a_.ptr[i + 1] && a_.keys[k] >= second; ++k) {
            const double r = a_.values[k] - a_.v[a_.columns[k]];
            if (r > first) {
                second = first;
                first = r;
                at = k;
            } else if (r > second) {
                second = r;
            }
        }
        if (first < a_.threshold[i]) at = -1;
        // A column left out may be the second best, but is not above the threshold.
        return Best{first, second > a_.threshold[i] ? second : a_.threshold[i], at};
    }

    // Among columns as good as the best, one that nobody owns.
    int64_t open_among_equals(int i, const Best& b) const {
        int64_t last = b.at;
        for (int64_t k = a_.ptr[i]; k < a_.ptr[i + 1] && a_.keys[k] >= b.first; ++k) {
            if (a_.values[k] - a_.v[a_.columns[k]] != b.first) continue;
            last = k;
            if (owner_[a_.columns[k]] < 0) break;
        }
        return last;
    }

    // Free rows bid, as in assign_bidding.h; one whose list cannot tell its best column waits for a longer list.
    Status reduce_rows() {
        constexpr int passes = 3;
        for (int pass = 0; pass < passes && free_count_ > 0; ++pass) {
            int next = 0;
            int64_t steps = 4 * static_cast<int64_t>(n_);
            for (int f = 0; f < free_count_; ++f) {
                int i = free_[f];
                if ((f & 63) == 0 && a_.poll()) return Status::interrupted;
                for (;;) {
                    const Best b = best_of(i);
                    if (b.at < 0) {
                        a_.wanted[i] = 1;
                        free_[next++] = i;
                        break;
                    }
                    int64_t at = b.at;
                    const double before = a_.v[a_.columns[at]], after = before + (b.first - b.second);
                    const bool rises = n_ > 1 && after > before;
                    if (!rises && owner_[a_.columns[at]] >= 0) at = open_among_equals(i, b);
                    const int j = a_.columns[at];
                    if (rises) a_.v[j] = after;
                    const int out = owner_[j];
                    take(i, at);
                    if (out < 0) break;
                    if (!rises || --steps < 0) {
                        free_[next++] = out;
                        break;
                    }
                    i = out;
                }
            }
            free_count_ = next;
        }
        return Status::ok;
    }

    void relax(int i, int64_t k, double length) {
        const int j = a_.columns[k];
        if (length < now_) length = now_;
        if (!(length < length_[j]) || done_[j] != 0) return;
        from_[j] = i;
        from_at_[j] = k;
        if (owner_[j] < 0) {
            end_ = length;
            end_column_ = j;
            return;
        }
        if (length_[j] < kFar) {
            heap_.move_forward(length, j);
        } else {
            touched_[touched_count_++] = j;
            heap_.push(length, j);
        }
        length_[j] = length;
    }

    void expand(int i) {
        const double level = level_[i];
        for (int64_t k = a_.ptr[i]; k < a_.ptr[i + 1] && level - a_.keys[k] < end_; ++k) {
            const double length = level - (a_.values[k] - a_.v[a_.columns[k]]);
            if (length < end_) relax(i, k, length);
        }
        const double bound = level - a_.threshold[i];
        if (bound < end_) heap_.push(bound > now_ ? bound : now_, n_ + i);
    }

    // A shortest path on the lists. Where it comes to lengths at which a list may miss columns it goes on, to find what
    // other lists are too short, but is given up in the end.
    Status augment(int source, bool* matched) {
        constexpr int most_wanted = 64;
        const Best b = best_of(source);
        if (b.at < 0) {
            a_.wanted[source] = 1;
            return Status::ok;
        }
        heap_.clear();
        touched_count_ = 0;
        now_ = 0;
        end_ = kFar;
        end_column_ = -1;
        level_[source] = b.first;
        int wanted = 0, pops = 0;
        expand(source);
        while (!heap_.empty() && heap_.shortest() < end_ && wanted < most_wanted) {
            if ((++pops & 63) == 0 && a_.poll()) return Status::interrupted;
            const Waiting w = heap_.pop();
            now_ = w.length;
            if (w.id >= n_) {
                a_.wanted[w.id - n_] = 1;
                ++wanted;
                continue;
            }
            done_[w.id] = 1;
            const int i = owner_[w.id];
            level_[i] = length_[w.id] + (taken_[i] - a_.v[w.id]);
            expand(i);
        }
        if (wanted == 0 && end_column_ < 0) return Status::not_converged;
        *matched = wanted == 0;
        for (int k = 0; k < touched_count_; ++k) {
            const int j = touched_[k];
            if (*matched && done_[j] != 0 && length_[j] < end_) a_.v[j] += end_ - length_[j];
            length_[j] = kFar;
            done_[j] = 0;
        }
        for (int64_t j = end_column_; *matched;) {
            const int i = from_[j];
            const int64_t before = a_.column_of[i];
            a_.column_of[i] = -1;
            owner_[j] = -1;
            take(i, from_at_[j]);
            if (i == source) break;
            j = before;
        }
        return Status::ok;
    }

    const AssignListsArgs& a_;
    const int n_;
    Buffer<char> memory_;
    int32_t* owner_ = nullptr;    // [column] row, or -1
    double* taken_ = nullptr;     // [row] the entry taken
    int32_t* free_ = nullptr;     // rows
    double* length_ = nullptr;    // [column] kFar: not reached
    int32_t* from_ = nullptr;     // [column] the row it was reached from
    int64_t* from_at_ = nullptr;  // [column] and the place on its list
    uint8_t* done_ = nullptr;     // [column]
    int32_t* touched_ = nullptr;  // columns reached
    double* level_ = nullptr;     // [row] length at which it was reached + its dual
    Heap heap_;
    int free_count_ = 0, touched_count_ = 0, end_column_ = -1;
    double now_ = 0, end_ = 0;
};

}  // namespace

Status assign_tile(const AssignTileArgs& a);
Status assign_tile(const AssignTileArgs& a) {
    if (a.n == 0 || a.rows == 0) return Status::ok;
    if (a.n > INT32_MAX / 4) return Status::no_memory;
    switch (a.dtype) {
        case Dtype::f32: return Candidates<float>(a).run();
        case Dtype::f64: return Candidates<double>(a).run();
        default: return Status::unsupported;
    }
}

Status assign_lists(const AssignListsArgs& a);
Status assign_lists(const AssignListsArgs& a) {
    if (a.n > INT32_MAX / 4) return Status::no_memory;
    return ListSolver(a).run();
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
