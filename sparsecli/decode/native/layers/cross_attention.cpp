#include "layers/cross_attention.h"

namespace sparsecli {

CrossAttention::CrossAttention(Workspace& space) : heads_(space, space.model.crosses()) {
    space.for_tokens(shared_projection_, space.shape.query_modules ? space.shape.d_model : 0, true);
}

void CrossAttention::read_encoder(Pass& pass) {
    const Buffer<float>& states = pass.space.residual;
    const Range rows = pass.mine(pass.count(), 1);
    for (int64_t t = rows.begin; t < rows.end; ++t)
        std::memcpy(states.row(t), pass.token(t).encoder_states[0], size_t(pass.shape.d_model) * sizeof(float));
    pass.barrier(OTHER);
    const Activations x = pass.readable(states);
    for (int64_t layer_idx = 0; layer_idx < pass.shape.layers; ++layer_idx) {
        const AttentionLayer& layer = pass.model.blocks[size_t(layer_idx)].cross;
        pass.linear(layer.key, x, heads_.keys);
        pass.linear(layer.value, x, heads_.values);
        pass.barrier(PROJECTION);
        pass.each(pass.shape.heads, [&](int64_t t, int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head)
                heads_.append(pass, &Sequence::cross_attention, layer_idx, t, head);
        });
        pass.barrier(ATTENTION);
    }
}

void CrossAttention::run(Pass& pass, const AttentionLayer& layer, int64_t layer_idx) {
    const bool convolved = pass.shape.query_modules;
    const Activations x = pass.normalized(layer.norm);
    if (pass.single()) prefetch_cache(pass, &Sequence::cross_attention, layer_idx);
    pass.mark(OTHER);
    if (convolved)
        convolve_queries(pass, layer, layer_idx, x);
    else
        pass.linear(layer.query, x, heads_.queries);
    pass.barrier(convolved ? CONVOLUTION : PROJECTION);
    attend(pass, heads_, &Sequence::cross_attention, layer_idx, nullptr, 1 / std::sqrt(float(pass.shape.head_width)),
           convolved);
    pass.barrier(ATTENTION);
    if (!convolved) heads_.project_output(pass, layer.output);
}

void CrossAttention::convolve_queries(Pass& pass, const AttentionLayer& layer, int64_t layer_idx,
                                      const Activations& x) {
    const int64_t modules = pass.shape.query_modules, width = pass.model.query_module_width();
    pass.each(modules, [&](int64_t t, int64_t begin, int64_t end) {
        const Token& token = pass.token(t);
        pass.multiply(layer.shared, x.values + t * x.stride, begin, end, shared_projection_.row(t));
        token.sequence->query_inputs.append(pass.ops, layer_idx, token.position, shared_projection_.row(t),
                                            begin * width, end * width);
    });
    pass.barrier(MULTIPLY);
    pass.each(modules, [&](int64_t t, int64_t begin, int64_t end) {
        const Token& token = pass.token(t);
        convolve(pass, layer.query_convolution, token.sequence->query_inputs, layer_idx, token.position, width, width,
                 begin, end, heads_.queries.row(t));
    });
}

}  // namespace sparsecli
