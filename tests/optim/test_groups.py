"""Groups of parameters by name, and learning rates that transfer between widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer, init_weights
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.plan import planned
from tests.optim.test_driver import make
from trainer import config_file


def rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("preset", ["adamw", "galore"])
def test_groups_have_their_own_rate_and_decay(preset: str) -> None:
    model = make()
    groups = (
        {"match": "up.*", "lr": 5e-3},
        {"match": "*.weight", "weight_decay": 0.3},
        {"match": "few.bia?", "lr": 7e-3, "weight_decay": 0.2},
    )
    found = rates(build_optimizer(model, preset=preset, lr=1e-3, rest_lr=2e-3, weight_decay=0.1, groups=groups), model)
    assert found["up.weight"] == (pytest.approx(5e-3), 0.1)  # the first that matches counts
    assert found["down.weight"] == (pytest.approx(1e-3), 0.3)
    assert found["embed.weight"] == (pytest.approx(2e-3), 0.3)
    assert found["few.bias"] == (pytest.approx(7e-3), 0.2)
    assert found["norm.bias"] == (pytest.approx(2e-3), 0.0)


@pytest.mark.parametrize("preset", ["adamw", "adamw_8bit"])
def test_a_rate_outside_the_schedule_stays(preset: str) -> None:
    """Through an engine's steps: the others follow the rate that each step is given."""
    from trainer.build import build_engine
    from trainer.config import RunConfig

    groups = [
        {"match": "embed.*", "lr": 3e-3, "schedule": "none"},
        {"match": "head.*", "schedule": "none"},
        {"match": "norm.*", "lr": 2e-3},
    ]
    values = {"model": {"d_model": 16, "n_heads": 2, "layers": ["swa"]}, "optim": {"preset": preset, "lr": 1e-3, "groups": groups}}
    engine = build_engine(RunConfig.model_validate(values), 64, None, torch.device("cpu"))
    tokens = torch.arange(8).view(1, 8)
    batch = Batch(tokens, tokens + 1, tokens, Bounds.whole(1, 8))
    for lr in (1e-4, 5e-4):
        engine.forward_backward([batch])
        before = engine.model.embed.weight.detach().clone()
        engine.step(lr)
        found = rates(engine.optimizer, engine.model)  # type: ignore[arg-type]
        assert found["embed.weight"][0] == pytest.approx(3e-3) and found["head.weight"][0] == pytest.approx(1e-3)
        assert found["norm.weight"][0] == pytest.approx(2 * lr) and found["blocks.0.mixer.wq.weight"][0] == pytest.approx(lr)
        assert not torch.equal(before, engine.model.embed.weight)
    with pytest.raises(ValueError, match="give it lr, weight_decay or schedule"):
        OptimConfig.model_validate({"groups": [{"match": "up.*", "schedule": "run"}]})


def test_a_group_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.groups: 'blocks\.\*' matches no parameter.*names are embed\.weight"):
        build_optimizer(make(), groups=({"match": "blocks.*", "lr": 1e-3},))
    with pytest.raises(ValueError, match="'up.weight' matches no parameter, or none that a group before it leaves"):
        build_optimizer(make(), groups=({"match": "up.*", "lr": 1e-3}, {"match": "up.weight", "lr": 1e-3}))
    with pytest.raises(ValueError, match=r"group up\.\* sets nothing"):
        OptimConfig.model_validate({"groups": [{"match": "up.*"}]})


def test_groups_are_written_in_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  groups:\n    - {match: 'blocks.*', lr: 1e-3}\n    - match: head.weight\n      weight_decay: 0.2\n")
    config = config_file.resolve(file, [])
    assert [(group.match, group.lr, group.weight_decay) for group in config.optim.groups] == [
        ("blocks.*", 1e-3, None),
        ("head.weight", None, 0.2),
    ]
    again = tmp_path / "again.yaml"
    again.write_text(config_file.dump(config))
    assert config_file.resolve(again, []) == config
    given = config_file.resolve(file, ['optim.groups=[{match: "*.norm*", weight_decay: 0.1}]'])
    assert [group.match for group in given.optim.groups] == ["*.norm*"]
    with pytest.raises(UserError, match=r"unknown key 'optim\.groups\.0\.rate'"):
        config_file.resolve(file, ["optim.groups=[{match: a, rate: 1}]"])
    with pytest.raises(ValueError, match="'zz' matches no parameter"):
        planned(make(), OptimConfig.model_validate({"groups": [{"match": "zz", "lr": 1e-3}]}))


# --- width


def changes(width: int, base: int | None, steps: int = 4) -> tuple[float, float]:
    """Root mean square change of the last block's output and of the logits, per coordinate, after some steps from the first."""
    config = ModelConfig.model_validate({"d_model": width, "n_heads": width // 16, "n_kv_heads": width // 16, "layers": ["full", "full"]})
    model = Transformer(config, 64)
    init_weights(model, 0, base)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(24).expand(2, -1).contiguous(), Bounds.whole(2, 24))
    optimizer = build_optimizer(model, preset="adamw_8bit", lr=3e-3, weight_decay=0.0, mup_base_width=base)
    assert model.head is not None

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return model.stream(batch), model.hidden(batch) @ model.head.weight.T  # pyright: ignore[reportOptionalMemberAccess]

    before = outputs()
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).mean().backward()
        optimizer.step()
    hidden, logits = (float((after - first).square().mean().sqrt()) for after, first in zip(outputs(), before, strict=True))
    return hidden, logits


def test_changes_stay_of_one_size_over_widths() -> None:
    """The coordinate check of arXiv 2203.03466, figure 5: without the scaling changes grow with the width."""
    scaled, plain = ([changes(width, base) for width in (32, 128, 512)] for base in (32, None))
    for kind in (0, 1):
        assert 0.5 < scaled[2][kind] / scaled[0][kind] < 2, scaled
    assert plain[2][1] / plain[0][1] > 4, plain
    assert scaled[0] == pytest.approx(plain[0])  # at the base width nothing changes


def test_where_rates_do_not_transfer_it_is_refused() -> None:
    for preset in ("sgd", "muon", "galore", "apollo", "adalomo"):
        with pytest.raises(ValueError, match=f"those of {preset} do not: leave it null, or take preset adamw"):
            OptimConfig(preset=preset, mup_base_width=64)
    with pytest.raises(ValueError, match="those of composed do not"):
        OptimConfig(preset="composed", projector="gaussian", mup_base_width=64)
    assert OptimConfig(preset="composed", state="bf16", mup_base_width=64).mup_base_width == 64
    with pytest.raises(ValueError, match="needs a model with embeddings of one width; found none"):
        build_optimizer(torch.nn.Linear(4, 4), mup_base_width=2)
    tied = Transformer(ModelConfig.model_validate({"d_model": 32, "n_heads": 2, "layers": ["full"], "tie_embeddings": True}), 64)
    with pytest.raises(ValueError, match="set model.tie_embeddings false"):
        init_weights(tied, 0, 16)


def test_only_linear_layers_are_slowed() -> None:
    model = make()
    found = rates(build_optimizer(model, preset="adamw", lr=1e-3, mup_base_width=24), model)
    assert {name for name, (lr, _) in found.items() if lr == pytest.approx(1e-3 / 4)} == {
        *("up.weight", "down.weight", "few.weight", "head.weight"),
    }
