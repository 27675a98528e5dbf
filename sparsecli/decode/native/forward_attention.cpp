// Projections, convolutions and attention of one block.
#include "forward.h"

namespace sparsecli {

void Forward::attention(const Block& block, int64_t layer, int64_t worker) {
    const Activations x = normalized(block.attention_norm, worker);
    mark(worker, OTHER);
    const sparsecli_shape& s = shape_;
    // A head's projections, cache and attention fall to one thread where the parts coincide: no waiting then.
    const bool aligned = count() == 1 && s.key_value_heads % pool_.active() == 0;
    bool ready = false;
    if (model_.convolves()) {
        share_projection(block, layer, x, worker);
        barrier(worker, s.projection == DENSE_CONV ? PROJECTION : MULTIPLY);
        each(s.modules, worker, [&](int64_t t, int64_t begin, int64_t end) { convolve(block, layer, t, begin, end, worker); });
        mark(worker, CONVOLUTION);
        ready = aligned && s.modules == s.key_value_heads;
    } else if (model_.low_rank()) {
        low_rank_projection(block, x, worker);
        mark(worker, PROJECTION);
    } else if (s.projection == DENSE) {
        linear(block.query, x, q_.row(0), a_stride_, worker);
        linear(block.key, x, k_row_.row(0), a_stride_, worker);
        linear(block.value, x, v_.row(0), a_stride_, worker);
        mark(worker, PROJECTION);
    } else {
        each(s.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
            const float* row = x.values + t * x.stride;
            multiply(block.query, row, begin, end, q_.row(t), worker);
            multiply(block.key, row, begin, end, k_row_.row(t), worker);
            multiply(block.value, row, begin, end, v_.row(t), worker);
        });
        mark(worker, MULTIPLY);
    }
    if (count() == 1) fetch_cache(layer, worker);
    if (!ready) barrier(worker, OTHER);
    each(s.key_value_heads, worker, [&](int64_t t, int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) append(block, layer, t, head);
    });
    if (!aligned) barrier(worker, ATTENTION);
    attend(block, layer, worker);
    barrier(worker, ATTENTION);
    if (s.output != NO_OUTPUT) project_output(block, layer, worker);
}

// Values, and queries and keys by two products each; the first two and values need one another's results only after
// them. With many rows the forms of a row are kept in one place: keys wait until queries are done with it.
void Forward::low_rank_projection(const Block& block, const Activations& x, int64_t worker) {
    linear(block.query_first, x, query_first_.row(0), query_first_.stride, worker);
    linear(block.key_first, x, key_first_.row(0), key_first_.stride, worker);
    linear(block.value, x, v_.row(0), a_stride_, worker);
    barrier(worker, PROJECTION);
    const Activations queries = readable(query_first_, query_first_.stride, worker);
    linear(block.query, queries, q_.row(0), a_stride_, worker);
    if (count() > 1) barrier(worker, PROJECTION);
    const Activations keys = readable(key_first_, key_first_.stride, worker);
    linear(block.key, keys, k_row_.row(0), a_stride_, worker);
}

// The projection that convolutions share, kept for the positions to come.
void Forward::share_projection(const Block& block, int64_t layer, const Activations& x, int64_t worker) {
    const auto keep = [&](int64_t t, int64_t begin, int64_t end) {
        remember(history(layer, t), m_.row(t), begin, end);
        if (shape_.value_concat) remember_joined(layer, t, x.values + t * x.stride, begin, end);
    };
    if (shape_.projection == DENSE_CONV) {
        const Range columns = linear(block.shared, x, m_.row(0), d_stride_, worker);
        for (int64_t t = 0; t < count(); ++t) keep(t, columns.begin, columns.end);
        return;
    }
    each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        multiply(block.shared, x.values + t * x.stride, begin, end, m_.row(t), worker);
        keep(t, begin * model_.module_width(), end * model_.module_width());
    });
}

Forward::History Forward::history(int64_t layer, int64_t t) const {
    return history_of((*rows_)[size_t(t)], (*rows_)[size_t(t)].sequence->history, layer, sizes_.history_row,
                      sizes_.history_margin);
}

Forward::History Forward::history_of(const Row& row, const Buffer<char>& buffer, int64_t layer, int64_t elements,
                            int64_t margin) const {
    const int64_t bytes = elements * type_bytes(shape_.history_type);
    const int64_t rows = shape_.kernel - 1 + row.sequence->capacity;
    return {buffer.data + (layer * rows + shape_.kernel - 1) * bytes, bytes, margin, row.position};
}

void Forward::remember(const History& to, const float* from, int64_t begin, int64_t end) const {
    const int64_t type = shape_.history_type;
    char* row = to.base + to.position * to.row + (to.margin + begin) * type_bytes(type);
    k_.convert(from + begin, type, end - begin, row);
}

// Where values read x beside m: module by module, or one vector after the other.
void Forward::remember_joined(int64_t layer, int64_t t, const float* x, int64_t begin, int64_t end) const {
    const Row& row = (*rows_)[size_t(t)];
    const History to = history_of(row, row.sequence->value_history, layer, sizes_.value_history_row, 0);
    const int64_t width = model_.module_width(), type = shape_.history_type, bytes = type_bytes(type);
    char* at = to.base + to.position * to.row;
    for (int64_t i = begin; i < end; ++i) {
        const bool whole = shape_.value_concat == CONCAT_WHOLE;
        const int64_t first = whole ? i : i / width * 2 * width + i % width;
        const int64_t second = first + (whole ? shape_.d_model : width);
        k_.convert(m_.row(t) + i, type, 1, at + first * bytes);
        k_.convert(x + i, type, 1, at + second * bytes);
    }
}

void Forward::convolve(const Block& block, int64_t layer, int64_t t, int64_t begin, int64_t end, int64_t worker) {
    const int64_t width = model_.module_width();
    const History m = history(layer, t);
    run_convolution(block.query_convolution, m, width, width, begin, end, q_.row(t), worker);
    run_convolution(block.key_convolution, m, width, width, begin, end, k_row_.row(t), worker);
    if (!shape_.value_concat) return run_convolution(block.value_convolution, m, width, 0, begin, end, v_.row(t), worker);
    const Row& row = (*rows_)[size_t(t)];
    const History joined = history_of(row, row.sequence->value_history, layer, sizes_.value_history_row, 0);
    run_convolution(block.value_convolution, joined, 2 * width, 0, begin, end, v_.row(t), worker);
}

void Forward::run_convolution(const Convolution& convolution, const History& from, int64_t stride, int64_t lead,
                              int64_t begin, int64_t end, float* out, int64_t worker) {
    std::vector<const void*>& taps = workers_[size_t(worker)].taps;
    for (int64_t tap = 0; tap < shape_.kernel; ++tap)
        taps[size_t(tap)] = from.base + (from.position - shape_.kernel + 1 + tap) * from.row +
                            from.margin * type_bytes(shape_.history_type);
    k_.convolve(convolution.kernel, values(convolution.bias), shape_.kernel, taps.data(), stride, lead, begin, end,
                out);
}

HeadCache Forward::head_cache(const Sequence& sequence, int64_t layer, int64_t head) const {
    const int64_t positions = round_up(sequence.capacity, LANES), bytes = type_bytes(shape_.cache_type);
    const int64_t at = layer * shape_.key_value_heads + head;
    return {sequence.keys.data + at * positions * shape_.head_width * bytes,
            sequence.values.data + at * positions * sizes_.value_stride * bytes,
            sequence.key_scales.data ? sequence.key_scales.data + at * positions : nullptr,
            sequence.value_scales.data ? sequence.value_scales.data + at * positions : nullptr};
}

// A head of queries or keys as attention reads it: normalised where there is a norm, then pairs (i, i + width / 2) of
// its rotary part turned by the row's angles.
void Forward::prepare_head(const Norm& norm, float* head, int64_t t) const {
    if (norm.weight.data)
        k_.normalize(head, values(norm.weight), nullptr, shape_.head_width, true, shape_.epsilon, head);
    if (shape_.positions != ROTARY) return;
    const int64_t half = shape_.rotary_width / 2;
    const float *cosine = angles_.row(t), *sine = cosine + half;
    for (int64_t i = 0; i < half; ++i) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cosine[i] - second * sine[i];
        head[half + i] = second * cosine[i] + first * sine[i];
    }
}

void Forward::append(const Block& block, int64_t layer, int64_t t, int64_t head) {
    const Row& row = (*rows_)[size_t(t)];
    const int64_t width = shape_.head_width;
    float* key = k_row_.row(t) + head * width;
    prepare_head(block.key_norm, key, t);
    k_.append(key, v_.row(t) + head * width, shape_.cache_type, width, row.position,
              head_cache(*row.sequence, layer, head), sizes_.value_stride);
}

// Asks for the beginning of this worker's keys and values, all heads at once; the rest follows in streams.
void Forward::fetch_cache(int64_t layer, int64_t worker) const {
    const Row& row = (*rows_)[0];
    const Range heads = mine(shape_.key_value_heads, 1, worker);
    const int64_t bytes = type_bytes(shape_.cache_type);
    for (int64_t head = heads.begin; head < heads.end; ++head) {
        const HeadCache cache = head_cache(*row.sequence, layer, head);
        const int64_t held = std::min(row.position, FETCHED_POSITIONS);
        k_.fetch(cache.keys, held * shape_.head_width * bytes);
        k_.fetch(cache.values, held * sizes_.value_stride * bytes);
    }
}

// Queries that read the same keys go together: neighbouring rows of a sequence, heads of a group.
void Forward::attend(const Block& block, int64_t layer, int64_t worker) {
    const int64_t width = shape_.head_width, group = shape_.heads / shape_.key_value_heads, rows = count();
    float* scores = workers_[size_t(worker)].scores.row(0);
    const float rate = 1 / std::sqrt(float(width));
    // Ordered by key head, then row, then head of the group. A single row is shared out by key heads where they
    // are as many as the projections' parts.
    const bool aligned = rows == 1 && shape_.key_value_heads % pool_.active() == 0;
    const Range items = mine(shape_.heads * rows, aligned ? group : 1, worker);
    const float* queries[QUERIES];
    float* out[QUERIES];
    float mixed[QUERIES][MAX_HEAD_WIDTH];
    int64_t lengths[QUERIES], owner[QUERIES], head_of[QUERIES];
    for (int64_t item = items.begin; item < items.end;) {
        const int64_t key_head = item / (group * rows);
        const Sequence* sequence = (*rows_)[size_t(item / group % rows)].sequence;
        int64_t held = 0;
        for (; held < QUERIES && item < items.end && item / (group * rows) == key_head; ++item, ++held) {
            const int64_t t = item / group % rows;
            if ((*rows_)[size_t(t)].sequence != sequence) break;
            head_of[held] = key_head * group + item % group;
            owner[held] = t;
            float* query = q_.row(t) + head_of[held] * width;
            prepare_head(block.query_norm, query, t);
            queries[held] = query;
            lengths[held] = (*rows_)[size_t(t)].position + 1;
            out[held] = mixed[held];
        }
        k_.attend(queries, lengths, held, shape_.cache_type, width, head_cache(*sequence, layer, key_head),
                  sizes_.value_stride, rate, scores, score_stride_, out);
        for (int64_t i = 0; i < held; ++i) {
            const int64_t at = head_of[i] * width;
            float* to = (shape_.output == NO_OUTPUT ? x_ : mixed_).row(owner[i]) + at;
            for (int64_t c = 0; c < width; ++c)
                to[c] = shape_.output == NO_OUTPUT ? to[c] + mixed[i][c] : mixed[i][c];
        }
    }
}

void Forward::project_output(const Block& block, int64_t layer, int64_t worker) {
    if (shape_.output == DENSE_OUTPUT) {
        const Activations y = readable(mixed_, a_stride_, worker);
        add_to_residual(m_, linear(block.output, y, m_.row(0), d_stride_, worker));
        return barrier(worker, PROJECTION);
    }
    const int64_t width = model_.module_width();
    const bool convolved = shape_.output == MULTIPLICATIVE_CONV_OUTPUT;
    const auto past = [&](int64_t t) {
        const Row& row = (*rows_)[size_t(t)];
        return history_of(row, row.sequence->output_history, layer, sizes_.history_row, sizes_.history_margin);
    };
    each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        multiply(block.output, mixed_.row(t), begin, end, m_.row(t), worker);
        if (convolved) return remember(past(t), m_.row(t), begin * width, end * width);
        for (int64_t i = begin * width; i < end * width; ++i) x_.row(t)[i] += m_.row(t)[i];
    });
    barrier(worker, MULTIPLY);
    if (!convolved) return;
    each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        run_convolution(block.output_convolution, past(t), width, width, begin, end, q_.row(t), worker);
        for (int64_t i = begin * width; i < end * width; ++i) x_.row(t)[i] += q_.row(t)[i];
    });
    barrier(worker, CONVOLUTION);
}

}  // namespace sparsecli
