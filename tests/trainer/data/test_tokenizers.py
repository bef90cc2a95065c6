import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from models.errors import UserError
from trainer.data.tokenizers import ByteTokenizer, load_tokenizer


def make_tokenizer(folder: Path, eos: str | None = "<|endoftext|>", config: dict | None = None) -> Path:
    """A byte-level BPE tokenizer trained on the spot."""
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[eos] if eos else [], initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(["the cat and the hat and the bat"] * 5, trainer)
    built.enable_truncation(4)
    built.enable_padding(length=4)
    folder.mkdir(exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id, tokenizer.pad_id]) == text
    assert max(tokenizer.eos_id, tokenizer.pad_id) < tokenizer.vocab_size == 258


def test_hugging_face_tokenizer_from_folder_or_file(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tok")
    text = "the cat and <|endoftext|> the cat, é€😀 " * 20
    tokenizer = load_tokenizer(str(folder))
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) > 4, "truncation stored in the file must not cut documents"
    assert tokenizer.eos_id == 0
    assert tokenizer.eos_id not in ids, "a document cannot forge its end"
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.vocab_size > max(ids)
    assert load_tokenizer(str(folder / "tokenizer.json")).fingerprint() == tokenizer.fingerprint() != ByteTokenizer().fingerprint()


def test_end_token_named_beside_the_file_wins_and_changes_the_fingerprint(tmp_path: Path) -> None:
    plain = load_tokenizer(str(make_tokenizer(tmp_path / "a")))
    for named in ("the", {"content": "the"}):
        tokenizer = load_tokenizer(str(make_tokenizer(tmp_path / "b", config={"eos_token": named})))
        (the,) = tokenizer.encode_batch(["the"])
        assert [tokenizer.eos_id] == the.tolist()
        assert tokenizer.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    "case", ["missing", "empty folder", "not json", "not a tokenizer", "no end token", "unknown end token", "bad config"]
)
def test_unusable_tokenizer_names_the_setting_and_the_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "tok"
    match case:
        case "empty folder":
            path.mkdir()
        case "not json":
            path.write_bytes(b"\xff\xfe nonsense")
        case "not a tokenizer":
            path.write_text("{}")
        case "no end token":
            make_tokenizer(path, eos=None)
        case "unknown end token":
            make_tokenizer(path, config={"eos_token": "<nowhere>"})
        case "bad config":
            make_tokenizer(path)
            (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="data.tokenizer") as error:
        load_tokenizer(str(path))
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
