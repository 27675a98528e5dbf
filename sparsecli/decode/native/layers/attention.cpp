#include "layers/attention.h"

namespace sparsecli {

constexpr double UNIT_EPSILON = 1e-6;  // added to the mean square of a shared query before it becomes a key

Attention::Attention(Workspace& space) : heads_(space), lsh_(space) {
    const sparsecli_shape& s = space.shape;
    space.reads(s.query_rank);
    space.reads(s.key_rank);
    space.for_tokens(shared_projection_, space.model.convolves() ? s.d_model : 0, true);
    space.for_tokens(low_rank_query_, s.query_rank, true);
    space.for_tokens(low_rank_key_, s.key_rank, true);
    unit_length_.rows(1, s.head_width, s.head_width, false);
    std::fill_n(unit_length_.row(0), s.head_width, 1 / std::sqrt(float(s.head_width)));
}

// Kernels of the convolutions, to be prefetched while multiplicative layers compute.
void Attention::plan_ahead(Pass& pass, const AttentionLayer& layer) const {
    for (const Convolution* next : {&layer.query_convolution, &layer.key_convolution, &layer.value_convolution}) {
        const Matrix& kernel = next->kernel;
        const int64_t taps = pass.shape.kernel;
        const int64_t elements = round_up(kernel.rows, LANES) * round_up(kernel.cols / taps, 4) * taps;
        if (kernel.data) pass.ahead.add(kernel.data, elements * type_bytes(kernel.type));
    }
}

void Attention::run(Pass& pass, const AttentionLayer& layer, int64_t cache_idx) {
    const sparsecli_shape& s = pass.shape;
    const bool hashes = pass.model.hashes();
    const Activations x = pass.normalized(layer.norm);
    pass.mark(OTHER);
    if (!pass.single() && !hashes) plan_cache_ahead(pass, &Sequence::self_attention, cache_idx);
    project(pass, layer, cache_idx, x);
    if (pass.single() && !hashes) prefetch_cache(pass, &Sequence::self_attention, cache_idx);

    // A head's projection, cache and attention are one worker's where the shares coincide: no barrier then.
    const bool aligned = pass.single() && s.key_value_heads % pass.workers() == 0;
    const bool projected = aligned && pass.model.convolves() && s.modules == s.key_value_heads;
    if (!projected) pass.barrier(OTHER);
    if (s.query_key_norm == PROJECTION_NORM) normalize_projections(pass, layer);
    pass.each(s.key_value_heads, [&](int64_t t, int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
            prepare_key(pass, layer, cache_idx, t, head);
            heads_.append(pass, &Sequence::self_attention, cache_idx, t, head);
            if (hashes) lsh_.hash_key(pass, cache_idx, t, head);
        }
    });
    if (!aligned) pass.barrier(ATTENTION);
    const bool to_residual = s.output == NO_OUTPUT, shared = s.shared_query_key;
    if (hashes)
        lsh_.attend(pass, heads_, cache_idx, to_residual);
    else
        attend(pass, heads_, &Sequence::self_attention, cache_idx, shared ? nullptr : &layer.query_norm,
               shared ? 1 : float(s.attention_scale), to_residual);
    pass.barrier(ATTENTION);
    if (s.output == DENSE_OUTPUT) heads_.project_output(pass, layer.output);
    if (s.output > DENSE_OUTPUT) multiply_output(pass, layer, cache_idx);
}

// Queries, keys and values of all tokens; a barrier has to follow.
void Attention::project(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, const Activations& x) {
    const int64_t projection = pass.shape.projection;
    if (pass.model.convolves()) {
        project_shared(pass, layer, cache_idx, x);
        pass.barrier(projection == DENSE_CONV ? PROJECTION : MULTIPLY);
        pass.each(pass.shape.modules,
                  [&](int64_t t, int64_t begin, int64_t end) { convolve(pass, layer, cache_idx, t, begin, end); });
        pass.mark(CONVOLUTION);
    } else if (projection == DENSE) {
        if (pass.model.low_rank())
            project_low_rank(pass, layer, x);
        else
            project_dense(pass, layer, x);
        pass.mark(PROJECTION);
    } else {
        project_multiplicative(pass, layer, x);
        pass.mark(MULTIPLY);
    }
}

void Attention::project_dense(Pass& pass, const AttentionLayer& layer, const Activations& x) {
    pass.linear(layer.query, x, heads_.queries);
    if (pass.shape.shared_query_key != ONE_PROJECTION) pass.linear(layer.key, x, heads_.keys);
    pass.linear(layer.value, x, heads_.values);
}

// Queries and keys by two products each. With many tokens the integers of both use the same buffer: keys wait until
// queries are computed.
void Attention::project_low_rank(Pass& pass, const AttentionLayer& layer, const Activations& x) {
    pass.linear(layer.query_first, x, low_rank_query_);
    pass.linear(layer.key_first, x, low_rank_key_);
    pass.linear(layer.value, x, heads_.values);
    pass.barrier(PROJECTION);
    const Activations queries = pass.readable(low_rank_query_);
    pass.linear(layer.query, queries, heads_.queries);
    if (!pass.single()) pass.barrier(PROJECTION);
    const Activations keys = pass.readable(low_rank_key_);
    pass.linear(layer.key, keys, heads_.keys);
}

void Attention::project_multiplicative(Pass& pass, const AttentionLayer& layer, const Activations& x) {
    pass.each(pass.shape.modules, [&](int64_t t, int64_t begin, int64_t end) {
        const float* row = x.values + t * x.stride;
        pass.multiply(layer.query, row, begin, end, heads_.queries.row(t));
        if (pass.shape.shared_query_key != ONE_PROJECTION)
            pass.multiply(layer.key, row, begin, end, heads_.keys.row(t));
        pass.multiply(layer.value, row, begin, end, heads_.values.row(t));
    });
}

// Queries and keys, all heads together; a barrier follows.
void Attention::normalize_projections(Pass& pass, const AttentionLayer& layer) {
    const sparsecli_shape& s = pass.shape;
    const Range rows = pass.mine(2 * pass.count(), 1);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const bool query = row % 2 == 0;
        float* x = (query ? heads_.queries : heads_.keys).row(row / 2);
        const Norm& norm = query ? layer.query_norm : layer.key_norm;
        const int64_t width = query ? pass.model.attention_width() : pass.model.key_width();
        pass.ops.normalize(x, values(norm.weight), nullptr, width, true, s.epsilon, x);
    }
    pass.barrier(OTHER);
}

// The projection that convolutions share, appended to their inputs.
void Attention::project_shared(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, const Activations& x) {
    const sparsecli_shape& s = pass.shape;
    const auto append = [&](int64_t t, int64_t begin, int64_t end) {
        const Sequence* sequence = pass.token(t).sequence;
        const int64_t position = pass.token(t).position;
        const float* m = shared_projection_.row(t);
        sequence->projection_inputs.append(pass.ops, cache_idx, position, m, begin, end);
        if (s.value_concat)
            append_concatenated(pass.model, pass.ops, sequence->value_inputs, cache_idx, position, m,
                                x.values + t * x.stride, begin, end);
    };
    if (s.projection == DENSE_CONV) {
        const Range columns = pass.linear(layer.shared, x, shared_projection_);
        for (int64_t t = 0; t < pass.count(); ++t) append(t, columns.begin, columns.end);
        return;
    }
    const int64_t width = pass.model.module_width();
    pass.each(s.modules, [&](int64_t t, int64_t begin, int64_t end) {
        if (t + 1 < pass.count() && pass.token(t + 1).sequence != pass.token(t).sequence) {
            const Token& next = pass.token(t + 1);  // another text, whose inputs arrive meanwhile
            const ConvState& inputs = next.sequence->projection_inputs;
            pass.ops.prefetch(inputs.row(cache_idx, next.position - inputs.padding),
                              (inputs.padding + 1) * inputs.row_bytes);
        }
        pass.multiply(layer.shared, x.values + t * x.stride, begin, end, shared_projection_.row(t));
        append(t, begin * width, end * width);
    });
}

void Attention::convolve(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, int64_t t, int64_t begin,
                         int64_t end) {
    const int64_t width = pass.model.module_width();
    const Token& token = pass.token(t);
    const auto run = [&](const Convolution& convolution, const ConvState& inputs, int64_t stride, int64_t lead,
                         const Buffer<float>& out) {
        sparsecli::convolve(pass, convolution, inputs, cache_idx, token.position, stride, lead, begin, end, out.row(t));
    };
    const ConvState &m = token.sequence->projection_inputs, &m_and_x = token.sequence->value_inputs;
    run(layer.query_convolution, m, width, width, heads_.queries);
    if (pass.shape.shared_query_key != ONE_PROJECTION) run(layer.key_convolution, m, width, width, heads_.keys);
    if (pass.shape.value_concat)
        run(layer.value_convolution, m_and_x, 2 * width, 0, heads_.values);
    else
        run(layer.value_convolution, m, width, 0, heads_.values);
}

// The key of a token's head. A shared one is its query at unit length; the query is then prepared, too.
void Attention::prepare_key(Pass& pass, const AttentionLayer& layer, int64_t cache_idx, int64_t t, int64_t head) {
    const int64_t width = pass.shape.head_width, shared = pass.shape.shared_query_key;
    float *query = heads_.queries.row(t) + head * width, *key = heads_.keys.row(t) + head * width;
    if (!shared) return prepare_head(pass, layer.key_norm, key, t, cache_idx);
    for (int64_t i = 0; i < width && shared == MEAN_OF_TWO; ++i) query[i] = (query[i] + key[i]) / 2;
    prepare_head(pass, layer.query_norm, query, t, cache_idx);
    pass.ops.normalize(query, unit_length_.row(0), nullptr, width, true, UNIT_EPSILON, key);
}

// A multiplicative output map, with a convolution behind it where the model has one.
void Attention::multiply_output(Pass& pass, const AttentionLayer& layer, int64_t cache_idx) {
    const int64_t width = pass.model.module_width();
    const bool convolved = pass.shape.output == MULTIPLICATIVE_CONV_OUTPUT;
    const Buffer<float>& output = pass.space.layer_output;
    const auto add = [&](int64_t t, int64_t begin, int64_t end) {
        for (int64_t i = begin * width; i < end * width; ++i) pass.residual(t)[i] += output.row(t)[i];
    };
    pass.each(pass.shape.modules, [&](int64_t t, int64_t begin, int64_t end) {
        pass.multiply(layer.output, heads_.mixed.row(t), begin, end, output.row(t));
        if (!convolved) return add(t, begin, end);
        pass.token(t).sequence->output_inputs.append(pass.ops, cache_idx, pass.token(t).position, output.row(t),
                                                     begin * width, end * width);
    });
    pass.barrier(MULTIPLY);
    if (!convolved) return;
    pass.each(pass.shape.modules, [&](int64_t t, int64_t begin, int64_t end) {
        const Token& token = pass.token(t);
        sparsecli::convolve(pass, layer.output_convolution, token.sequence->output_inputs, cache_idx, token.position,
                            width, width, begin, end, output.row(t));
        add(t, begin, end);
    });
    pass.barrier(CONVOLUTION);
}

}  // namespace sparsecli
