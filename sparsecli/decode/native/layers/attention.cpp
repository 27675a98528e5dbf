// Projections, convolutions and attention of one block.
#include "layers/forward.h"

namespace sparsecli {

void Forward::attention(const Block& block, int64_t index, int64_t layer_index, int64_t worker) {
    const AttentionLayer& layer = block.attention[index];
    const int64_t place = layer_index * shape_.attention_layers + index;
    workers_[size_t(worker)].ahead.clear();
    if (count() == 1) plan_ahead(layer, block, layer_index, worker);
    const Activations x = normalized(layer.norm, worker);
    mark(worker, OTHER);
    const sparsecli_shape& s = shape_;
    // A head's projections, cache and attention fall to one thread where the parts coincide: no waiting then.
    const bool aligned = count() == 1 && s.key_value_heads % pool_.active() == 0;
    const bool keys = s.shared_query_key != ONE_PROJECTION;
    bool ready = false;
    if (model_.convolves()) {
        share_projection(layer, place, x, worker);
        barrier(worker, s.projection == DENSE_CONV ? PROJECTION : MULTIPLY);
        each(s.modules, worker,
             [&](int64_t t, int64_t begin, int64_t end) { convolve(layer, place, t, begin, end, worker); });
        mark(worker, CONVOLUTION);
        ready = aligned && s.modules == s.key_value_heads;
    } else if (model_.low_rank()) {
        low_rank_projection(layer, x, worker);
        mark(worker, PROJECTION);
    } else if (s.projection == DENSE) {
        linear(layer.query, x, q_.row(0), a_stride_, worker);
        if (keys) linear(layer.key, x, k_row_.row(0), a_stride_, worker);
        linear(layer.value, x, v_.row(0), a_stride_, worker);
        mark(worker, PROJECTION);
    } else {
        each(s.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
            const float* row = x.values + t * x.stride;
            multiply(layer.query, row, begin, end, q_.row(t), worker);
            if (keys) multiply(layer.key, row, begin, end, k_row_.row(t), worker);
            multiply(layer.value, row, begin, end, v_.row(t), worker);
        });
        mark(worker, MULTIPLY);
    }
    if (count() == 1 && !model_.hashes()) fetch_cache(&Sequence::own, place, worker);
    if (!ready) barrier(worker, OTHER);
    each(s.key_value_heads, worker, [&](int64_t t, int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
            prepare_key(layer, t, head);
            append(&Sequence::own, place, t, head);
            if (model_.hashes()) hash_key(place, t, head, worker);
        }
    });
    if (!aligned) barrier(worker, ATTENTION);
    if (model_.hashes())
        attend_alike(place, worker);
    else
        attend(layer, &Sequence::own, place, worker);
    barrier(worker, ATTENTION);
    if (s.output == DENSE_OUTPUT) project_output(layer.output, worker);
    if (s.output > DENSE_OUTPUT) multiply_output(layer, place, worker);
}

// Values, and queries and keys by two products each; the first two and values need one another's results only after
// them. With many rows the forms of a row are kept in one place: keys wait until queries are done with it.
void Forward::low_rank_projection(const AttentionLayer& layer, const Activations& x, int64_t worker) {
    linear(layer.query_first, x, query_first_.row(0), query_first_.stride, worker);
    linear(layer.key_first, x, key_first_.row(0), key_first_.stride, worker);
    linear(layer.value, x, v_.row(0), a_stride_, worker);
    barrier(worker, PROJECTION);
    const Activations queries = readable(query_first_, query_first_.stride, worker);
    linear(layer.query, queries, q_.row(0), a_stride_, worker);
    if (count() > 1) barrier(worker, PROJECTION);
    const Activations keys = readable(key_first_, key_first_.stride, worker);
    linear(layer.key, keys, k_row_.row(0), a_stride_, worker);
}

// What a single token's multiplicative layer and convolutions, which compute more than they read, may ask for meanwhile:
// the kernels that come next, and this worker's part of the controller.
void Forward::plan_ahead(const AttentionLayer& layer, const Block& block, int64_t index, int64_t worker) {
    ReadAhead& ahead = workers_[size_t(worker)].ahead;
    for (const Convolution* next : {&layer.query_convolution, &layer.key_convolution, &layer.value_convolution}) {
        const Matrix& kernel = next->kernel;
        const int64_t taps = shape_.kernel;
        const int64_t elements = round_up(kernel.rows, LANES) * round_up(kernel.cols / taps, 4) * taps;
        if (kernel.data) ahead.add(kernel.data, elements * type_bytes(kernel.type));
    }
    if (shape_.feed_forward != SPARSE_UNITS || !model_.chooses(index)) return;
    const Matrix &first = block.controller_first, &second = block.controller_second;
    const Range ranks = mine(shape_.rank, 4, worker), blocks = mine(shape_.d_ff / shape_.block_size, 1, worker);
    const int64_t row = round_up(first.cols, PAD) * type_bytes(first.type);
    const int64_t bytes = model_.padded_block() * model_.padded_rank() * type_bytes(second.type);
    if (first.cols <= SPAN) ahead.add((const char*)first.data + ranks.begin * row, (ranks.end - ranks.begin) * row);
    ahead.add((const char*)second.data + blocks.begin * bytes, (blocks.end - blocks.begin) * bytes);
}

// The projection that convolutions share, kept for the positions to come.
void Forward::share_projection(const AttentionLayer& layer, int64_t place, const Activations& x, int64_t worker) {
    const auto keep = [&](int64_t t, int64_t begin, int64_t end) {
        remember(history(place, t), m_.row(t), begin, end);
        if (shape_.value_concat) remember_joined(place, t, x.values + t * x.stride, begin, end);
    };
    if (shape_.projection == DENSE_CONV) {
        const Range columns = linear(layer.shared, x, m_.row(0), d_stride_, worker);
        for (int64_t t = 0; t < count(); ++t) keep(t, columns.begin, columns.end);
        return;
    }
    each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        multiply(layer.shared, x.values + t * x.stride, begin, end, m_.row(t), worker);
        keep(t, begin * model_.module_width(), end * model_.module_width());
    });
}

Forward::History Forward::history(int64_t place, int64_t t) const {
    return history_of((*rows_)[size_t(t)], (*rows_)[size_t(t)].sequence->history, place, sizes_.history_row,
                      sizes_.history_margin);
}

Forward::History Forward::history_of(const Row& row, const Buffer<char>& buffer, int64_t place, int64_t elements,
                                     int64_t margin) const {
    const int64_t bytes = elements * type_bytes(shape_.history_type);
    const int64_t rows = shape_.kernel - 1 + row.sequence->capacity;
    return {buffer.data + (place * rows + shape_.kernel - 1) * bytes, bytes, margin, row.position};
}

void Forward::remember(const History& to, const float* from, int64_t begin, int64_t end) const {
    const int64_t type = shape_.history_type;
    char* row = to.base + to.position * to.row + (to.margin + begin) * type_bytes(type);
    k_.convert(from + begin, type, end - begin, row);
}

// Where values read x beside m: module by module, or one vector after the other.
void Forward::remember_joined(int64_t place, int64_t t, const float* x, int64_t begin, int64_t end) const {
    const Row& row = (*rows_)[size_t(t)];
    const History to = history_of(row, row.sequence->value_history, place, sizes_.value_history_row, 0);
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

void Forward::convolve(const AttentionLayer& layer, int64_t place, int64_t t, int64_t begin, int64_t end,
                       int64_t worker) {
    const int64_t width = model_.module_width();
    const History m = history(place, t);
    run_convolution(layer.query_convolution, m, width, width, begin, end, q_.row(t), worker);
    if (shape_.shared_query_key != ONE_PROJECTION)
        run_convolution(layer.key_convolution, m, width, width, begin, end, k_row_.row(t), worker);
    if (!shape_.value_concat)
        return run_convolution(layer.value_convolution, m, width, 0, begin, end, v_.row(t), worker);
    const Row& row = (*rows_)[size_t(t)];
    const History joined = history_of(row, row.sequence->value_history, place, sizes_.value_history_row, 0);
    run_convolution(layer.value_convolution, joined, 2 * width, 0, begin, end, v_.row(t), worker);
}

void Forward::run_convolution(const Convolution& convolution, const History& from, int64_t stride, int64_t lead,
                              int64_t begin, int64_t end, float* out, int64_t worker) {
    std::vector<const void*>& taps = workers_[size_t(worker)].taps;
    for (int64_t tap = 0; tap < shape_.kernel; ++tap)
        taps[size_t(tap)] = from.base + (from.position - shape_.kernel + 1 + tap) * from.row +
                            from.margin * type_bytes(shape_.history_type);
    k_.convolve(convolution.kernel, values(convolution.bias), shape_.kernel, taps.data(), stride, lead, begin, end, out,
                &workers_[size_t(worker)].ahead);
}

HeadCache Forward::head_cache(const KeyValues& held, int64_t place, int64_t head) const {
    const int64_t bytes = type_bytes(shape_.cache_type), at = (place * held.heads + head) * held.positions;
    const int64_t key_row = held.by_rows ? sizes_.value_stride : shape_.head_width;
    return {held.keys.data + at * key_row * bytes, held.values.data + at * sizes_.value_stride * bytes,
            held.key_scales.data ? held.key_scales.data + at : nullptr,
            held.value_scales.data ? held.value_scales.data + at : nullptr, held.by_rows};
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

// The key of a row's head; a shared one is its query at unit length, and the query is then ready, too.
void Forward::prepare_key(const AttentionLayer& layer, int64_t t, int64_t head) const {
    const int64_t width = shape_.head_width;
    float *query = q_.row(t) + head * width, *key = k_row_.row(t) + head * width;
    if (!shape_.shared_query_key) return prepare_head(layer.key_norm, key, t);
    for (int64_t i = 0; i < width && shape_.shared_query_key == MEAN_OF_TWO; ++i) query[i] = (query[i] + key[i]) / 2;
    prepare_head(layer.query_norm, query, t);
    k_.normalize(query, unit_.row(0), nullptr, width, true, UNIT_EPSILON, key);
}

void Forward::append(KeyValues Sequence::* to, int64_t place, int64_t t, int64_t head) const {
    const Row& row = (*rows_)[size_t(t)];
    const int64_t at = head * shape_.head_width;
    k_.append(k_row_.row(t) + at, v_.row(t) + at, shape_.cache_type, shape_.head_width, row.position,
              head_cache(row.sequence->*to, place, head), sizes_.value_stride);
}

// Asks for the beginning of this worker's keys and values, all heads at once; the rest follows in streams.
void Forward::fetch_cache(const KeyValues Sequence::* from, int64_t place, int64_t worker) const {
    const Row& row = (*rows_)[0];
    const KeyValues& kept = row.sequence->*from;
    const Range heads = mine(kept.heads, 1, worker);
    const int64_t bytes = type_bytes(shape_.cache_type);
    const int64_t length = from == &Sequence::source ? row.sequence->source_length : row.position;
    for (int64_t head = heads.begin; head < heads.end; ++head) {
        const HeadCache cache = head_cache(kept, place, head);
        const int64_t held = std::min(length, FETCHED_POSITIONS);
        k_.fetch(cache.keys, held * shape_.head_width * bytes);
        k_.fetch(cache.values, held * sizes_.value_stride * bytes);
    }
}

// Positions that a row's queries see. Where they are keys at the same time, a token sees itself only if it is alone.
int64_t Forward::seen(const Row& row, bool source) const {
    if (source) return row.sequence->source_length;
    return shape_.shared_query_key ? std::max<int64_t>(row.position, 1) : row.position + 1;
}

// Queries that read the same keys go together: neighbouring rows of a sequence, heads of a group.
void Forward::attend(const AttentionLayer& layer, const KeyValues Sequence::* to, int64_t place, int64_t worker) {
    const bool source = to == &Sequence::source, plain = source || shape_.shared_query_key;
    const bool added =
        source ? shape_.query_modules > 0 : shape_.output == NO_OUTPUT;  // to the residual stream at once
    const int64_t key_heads = source ? shape_.heads : shape_.key_value_heads;
    const int64_t width = shape_.head_width, group = shape_.heads / key_heads, rows = count();
    float* scores = workers_[size_t(worker)].scores.row(0);
    const float rate = !source && shape_.shared_query_key ? 1 : 1 / std::sqrt(float(width));
    // Ordered by key head, then row, then head of the group. A single row is shared out by key heads where they
    // are as many as the projections' parts.
    const bool aligned = rows == 1 && key_heads % pool_.active() == 0;
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
            if (!plain) prepare_head(layer.query_norm, query, t);
            queries[held] = query;
            lengths[held] = seen((*rows_)[size_t(t)], source);
            out[held] = mixed[held];
        }
        k_.attend(queries, lengths, held, shape_.cache_type, width, head_cache(sequence->*to, place, key_head),
                  sizes_.value_stride, rate, scores, score_stride_, out);
        for (int64_t i = 0; i < held; ++i) deliver(mixed[i], owner[i], head_of[i], added, worker);
    }
}

// What a head of a row read, to the residual stream or to the output projection.
void Forward::deliver(const float* y, int64_t t, int64_t head, bool added, int64_t worker) {
    const int64_t width = shape_.head_width;
    float* into = (added ? residual(t, worker) : mixed_.row(t)) + head * width;
    for (int64_t c = 0; c < width; ++c) into[c] = added ? into[c] + y[c] : y[c];
}

void Forward::project_output(const Map& output, int64_t worker) {
    const Activations y = readable(mixed_, a_stride_, worker);
    add_to_residual(m_, linear(output, y, m_.row(0), d_stride_, worker), worker);
    barrier(worker, PROJECTION);
}

Forward::History Forward::output_history(int64_t place, int64_t t) const {
    const Row& row = (*rows_)[size_t(t)];
    return history_of(row, row.sequence->output_history, place, sizes_.history_row, sizes_.history_margin);
}

void Forward::multiply_output(const AttentionLayer& layer, int64_t place, int64_t worker) {
    const int64_t width = model_.module_width();
    const bool convolved = shape_.output == MULTIPLICATIVE_CONV_OUTPUT;
    each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        multiply(layer.output, mixed_.row(t), begin, end, m_.row(t), worker);
        if (convolved) return remember(output_history(place, t), m_.row(t), begin * width, end * width);
        for (int64_t i = begin * width; i < end * width; ++i) residual(t, worker)[i] += m_.row(t)[i];
    });
    barrier(worker, MULTIPLY);
    if (!convolved) return;
    each(shape_.modules, worker, [&](int64_t t, int64_t begin, int64_t end) {
        run_convolution(layer.output_convolution, output_history(place, t), width, width, begin, end, q_.row(t),
                        worker);
        for (int64_t i = begin * width; i < end * width; ++i) residual(t, worker)[i] += q_.row(t)[i];
    });
    barrier(worker, CONVOLUTION);
}

}  // namespace sparsecli
