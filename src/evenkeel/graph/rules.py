"""The rule of each kind of operation: how scales pass through it.

What is not here pins all that it takes and gives.
"""

from collections.abc import Callable

from evenkeel.graph import passing, weights
from evenkeel.graph.passing import Rule

RULES: dict[str, Rule] = {}
"""By the name of the ATen operation, without overload or the underscore of those in place."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations; see :mod:`evenkeel.graph.passing`.

    ``@rule("my_op")`` serves ``my_library::my_op``.
    """

    def register(of: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, of))
        return of

    return register


_TABLE: list[tuple[Rule, str]] = [
    # elements are moved about
    (passing.viewed, """view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT
        movedim swapaxes slice select narrow diagonal unsqueeze squeeze chunk split
        split_with_sizes tensor_split unsafe_chunk unsafe_split unbind"""),
    (passing.moved, """cat stack expand expand_as view_as broadcast_to repeat tile roll flip rot90
        pixel_shuffle pixel_unshuffle channel_shuffle unfold slice_scatter select_scatter"""),
    (passing.copied, "copy"),
    (passing.picked, "index index_select gather repeat_interleave"),
    (passing.item, "getitem"),
    (passing.size, "sym_size"),
    (passing.zeros, "zeros_like new_zeros"),
    (passing.ones, "ones_like new_ones full_like new_full"),
    (passing.padded, "pad constant_pad_nd"),
    # element by element
    (passing.same, """relu leaky_relu rrelu abs neg positive dropout feature_dropout clone
        contiguous detach alias lift_fresh_copy to _to_copy type_as"""),
    (passing.clamped, "clamp clamp_min threshold"),
    (passing.gated, "glu"),
    (passing.nothing, """gelu silu mish elu celu selu hardswish hardsigmoid hardtanh relu6 sigmoid
        tanh softplus softmax _softmax log_softmax log_sigmoid softsign exp expm1 log log1p sqrt
        rsqrt pow square reciprocal sin cos erf lstm gru rnn_tanh alpha_dropout linalg_vector_norm
        var_mean var std logsumexp cumprod prod hardshrink softshrink bilinear argmax argmin topk
        gt lt ge le eq ne fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"""),
    # several become one
    (passing.reduced, "mean sum amax amin"),
    *((passing.over_space(n), f"""max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d
        adaptive_max_pool{n}d max_pool{n}d_with_indices reflection_pad{n}d replication_pad{n}d
        upsample_nearest{n}d _upsample_nearest_exact{n}d""") for n in (1, 2, 3)),
    (passing.over_space(1), "upsample_linear1d"),
    (passing.over_space(2), """upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa"""),
    (passing.over_space(3), "upsample_trilinear3d"),
    # two meet
    (passing.added, "add sub rsub maximum minimum"),
    (passing.chosen, "where"),
    (passing.filled, "masked_fill"),
    (passing.divided, "div"),
    (passing.attention, "scaled_dot_product_attention"),
    (weights.multiplied, "mul multiply"),
    (weights.multiplied_matrices, "matmul mm bmm"),
    # layers with weights
    (weights.linear, "linear"),
    (weights.addmm, "addmm"),
    *((weights.conv(n), f"conv{n}d") for n in (1, 2, 3)),
    *((weights.conv_transpose(n), f"conv_transpose{n}d") for n in (1, 2, 3)),
    (weights.quaternions, "quaternion_matrix"),
    (weights.embedding, "embedding"),
    (weights.rnn, "rnn_relu"),
    (weights.prelu, "prelu"),
    # normalizers
    (weights.normalized_channels, """batch_norm instance_norm cudnn_batch_norm
        _native_batch_norm_legit_no_training"""),
    (weights.normalized_groups, "group_norm"),
    (weights.normalized_features, "layer_norm"),
    (weights.normalized_squares, "rms_norm"),
]  # fmt: skip
for _rule, _names in _TABLE:
    rule(*_names.split())(_rule)
