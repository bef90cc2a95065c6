"""The mixer against the one of transformers, with the same weights."""

import torch

from models.batch import Bounds
from models.memory.mamba2 import Mamba2


def test_equals_the_mixer_of_transformers():
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    d_model, heads, size, state, groups = 12, 4, 6, 5, 2
    config = Mamba2Config(
        hidden_size=d_model, num_heads=heads, head_dim=size, state_size=state, n_groups=groups, expand=2, conv_kernel=4, chunk_size=8,
        use_bias=False, use_conv_bias=False, layer_norm_epsilon=1e-5, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    torch.manual_seed(0)
    peer = Mamba2Mixer(config, layer_idx=0)
    ours = Mamba2(d_model, heads, size, state, groups, chunk_size=8)
    inner, shared = heads * size, groups * state
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
        for p, rows in zip(
            (ours.w_gate, ours.w_x, ours.w_B, ours.w_C, ours.w_dt),
            peer.in_proj.weight.split([inner, inner, shared, shared, heads]),
            strict=True,
        ):
            p.weight.copy_(rows)
        for p, rows in zip(
            (ours.conv_x, ours.conv_B, ours.conv_C), peer.conv1d.weight.squeeze(1).split([inner, shared, shared]), strict=True
        ):
            p.copy_(rows)
        for name in ("A_log", "dt_bias", "D"):
            getattr(ours, name).copy_(getattr(peer, name))
        ours.norm_weight.copy_(peer.norm.weight)
        ours.w_out.weight.copy_(peer.out_proj.weight)
        x = torch.randn(2, 37, d_model)
        want = peer(x)
        got, _ = ours(x, None, Bounds.whole(2, 37))
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
