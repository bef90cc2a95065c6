"""Generated samples as training data: what every rank reads, resume, curricula, and what is refused."""

import json
from itertools import islice
from typing import Any

import pytest
from pydantic import ValidationError

from models.batch import IGNORE_INDEX
from models.errors import UserError
from tests.trainer.data.test_build import global_steps, rows, steps_of
from trainer.config import DataSection, RunConfig, TrainSection
from trainer.data.build import build_data, prepare
from trainer.planning import target_of, this_machine

STAGES = [{"from_step": 0, "pairs": 1, "length": 15}, {"from_step": 2, "pairs": 3, "gap": 5}]
MODES: list[dict[str, Any]] = [
    {"source": "synthetic/mqar"},
    {"source": "synthetic/mqar", "synthetic": {"pairs": 2, "length": 20}},
    {"source": "synthetic/mqar", "synthetic": {"curriculum": STAGES}},
    {"source": "synthetic/associative", "synthetic": {"curriculum": [{"from_step": 0, "pairs": 1}, {"from_step": 3, "pairs": 2}]}},
    {"source": "synthetic/passkey", "seq_len": 320, "synthetic": {"loss": "all"}},
]


def run_config(*, seed: int = 0, micro: int = 1, accum: int = 1, evals: int = 3, **data: Any) -> RunConfig:
    train = TrainSection(seed=seed, micro_batch_size=micro, grad_accum=accum, eval_sequences=evals)
    return RunConfig(data=DataSection.model_validate({"seq_len": 64, **data}), train=train)


@pytest.mark.parametrize("mode", MODES)
def test_any_topology_reads_the_same_samples_and_none_twice(mode: dict[str, Any]) -> None:
    want = global_steps(run_config(accum=4, **mode), 1, 4)
    for dp, micro, accum in ((2, 1, 2), (4, 1, 1), (1, 2, 2)):
        assert global_steps(run_config(micro=micro, accum=accum, **mode), dp, 4) == want
    seen = [row[0] for step in want for row in step]
    assert len(set(seen)) == len(seen)
    assert global_steps(run_config(accum=4, seed=1, **mode), 1, 1) != want[:1]


@pytest.mark.parametrize("mode", MODES)
def test_resume_from_every_cursor_equals_the_uninterrupted_run(mode: dict[str, Any]) -> None:
    config = run_config(accum=2, prefetch_batches=2, **mode)
    whole = steps_of(build_data(config), 6)
    for k in range(5):
        assert steps_of(build_data(config), 5 - k, json.loads(json.dumps(whole[k][1]))) == whole[k + 1 :]


@pytest.mark.parametrize("mode", MODES)
def test_held_out_samples_are_others_equally_many_on_every_rank(mode: dict[str, Any]) -> None:
    trained = {row[0] for step in global_steps(run_config(**mode), 1, 10) for row in step}
    for dp in (1, 2):
        ranks = [[rows(batch) for batch in build_data(run_config(**mode), rank, dp).valid(3)] for rank in range(dp)]
        assert len({len(batches) for batches in ranks}) == 1
        held = {row[0] for batches in ranks for batch in batches for row in batch if any(y != IGNORE_INDEX for y in row[1])}
        assert len(held) == 3 and not held & trained
    assert not list(build_data(run_config(evals=0, **mode)).valid(3))


def test_a_curriculum_goes_by_optimizer_steps_and_held_out_data_are_of_its_end() -> None:
    config = run_config(accum=2, **MODES[2])
    data = build_data(config)
    with data.train() as steps:
        batches = [micro for micro, _ in islice(steps, 4)]
    answers = [[int((batch.labels_BT != IGNORE_INDEX).sum()) for batch in step] for step in batches]
    assert answers == [[4, 4], [4, 4], [3, 3], [3, 3]], "four samples of 15 tokens with one pair, then one of 64 with three"
    assert batches[0][0].bounds.documents == ((0, 15, 30, 45, 60),) and batches[2][0].bounds.documents == ((0,),)
    assert all((batch.labels_BT != IGNORE_INDEX).sum() == 3 for batch in data.valid(3))
    # The same cursor with other sequences per step would be at another place of the curriculum.
    with pytest.raises(UserError, match=r"sequences per step .* was 2"):
        build_data(run_config(**MODES[2])).train({"plan": data.plan, "sequences": 4, "epoch": 0})


def test_labels_are_answers_or_every_token() -> None:
    answers = next(iter(build_data(run_config(seq_len=320, source="synthetic/passkey")).train()))[0][0]
    every = next(iter(build_data(run_config(**MODES[4])).train()))[0][0]
    assert (answers.tokens_BT == every.tokens_BT).all()
    asked = answers.labels_BT != IGNORE_INDEX
    assert asked.sum() == 5 and (answers.labels_BT[asked] == every.labels_BT[asked]).all()
    assert (every.labels_BT[:, :-1] == every.tokens_BT[:, 1:]).all() and bytes(every.labels_BT[0, -5:].tolist()).isdigit()


def test_a_vocabulary_of_ids_is_the_planners_too() -> None:
    config = run_config(source="synthetic/mqar", synthetic={"keys": 300, "values": 200, "fillers": 1})
    assert prepare(config)["vocab_size"] == 502 and target_of(config, this_machine("cpu")).vocab_size == 512
    with pytest.raises(UserError, match="vocab_size 64 is below the 502"):
        build_data(config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 64})}))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"path": "x"}, "data.path is not read"),
        ({"shuffle": "none"}, "data.shuffle is not read"),
        ({"streaming": True}, "data.streaming is not read"),
        ({"tokenizer": "somewhere"}, "data.tokenizer is not read"),
        ({"synthetic": {"digits": 3}}, "data.synthetic.digits is not read by synthetic/mqar"),
        ({"synthetic": {"loss": "all"}}, "data.synthetic.loss all"),
        ({"synthetic": {"curriculum": [{"from_step": 5}]}}, "the first begins at 0"),
        ({"source": "passkey"}, "source"),
        ({"source": "synthetic/passkey", "synthetic": {"curriculum": [{"from_step": 0, "pairs": 2}]}}, "sets pairs"),
        ({"source": "python_stdlib", "synthetic": {"pairs": 2}}, "data.synthetic is not read"),
    ],
)
def test_foreign_settings_are_refused(data: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DataSection.model_validate({"source": "synthetic/mqar", **data})


def test_samples_that_do_not_fit_are_refused_before_anything_starts() -> None:
    for synthetic, told in (({"length": 65}, "exceeds data.seq_len 64"), ({"pairs": 17}, "needs 68 tokens"), ({"pairs": 65}, "raise keys")):
        with pytest.raises(UserError, match=told):
            prepare(run_config(source="synthetic/mqar", synthetic=synthetic))
    with pytest.raises(ValidationError, match="generated samples do not"):
        RunConfig.model_validate({"data": {"source": "synthetic/mqar"}, "train": {"carry_state": "document"}})
