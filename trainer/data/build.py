"""The door of the data room: from the settings of a run to batches.

``prepare(config)`` once before ranks start (tokenises, finds all bad input), then ``build_data(config, dp_rank, dp_size)`` on
every rank. Try alone:
``python -c "from trainer.config import RunConfig; from trainer.data.build import prepare; print(prepare(RunConfig()))"``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from models.batch import Batch
from models.errors import RunFailed, UserError
from trainer.config import DataSection, RunConfig
from trainer.data.beside import Beside
from trainer.data.clusters import Clusters
from trainer.data.documents import Source
from trainer.data.held_out import split_documents, without_copies
from trainer.data.loader import Cursor, Share, Step, StoredSequences, held_out_batches, stored_steps, streamed_steps
from trainer.data.prefetch import Prefetcher
from trainer.data.prefixes import CAUSAL, Prefixes, PrefixUse, predicted_bytes_per_label
from trainer.data.sources import SourceKind, open_source
from trainer.data.store_builder import Progress, StoreSpec, open_or_build
from trainer.data.streaming import Place, SequenceStream
from trainer.data.synthetic import ENDLESS, SyntheticSequences
from trainer.data.token_store import TokenStore
from trainer.data.tokenizers import Tokenizer
from trainer.evals.registry import is_synthetic, tokenizer_of

ValidOrTrain = Literal["data.path", "data.valid_path"]

_CONTENT = "the training data (data.path, data.tokenizer, data.valid_*)"


@dataclass(frozen=True)
class Data:
    """What one data-parallel rank reads."""

    tokenizer: Tokenizer
    share: Share
    prefetch_batches: int
    training: StoredSequences | SequenceStream | SyntheticSequences
    held_out: StoredSequences | SyntheticSequences | None
    plan: dict[str, Any]
    """What a cursor is valid for, by the setting that decides it."""
    copies_left_out: int = 0

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer; the model needs at least as many rows."""
        return self.tokenizer.vocab_size

    def train(self, cursor: Cursor | None = None) -> Prefetcher[Step]:
        """Steps for ever from a cursor on (None: from the start): ``(micro-batches, cursor after them)``.

        Use it in a ``with`` block or call ``close()``. Raises UserError when the cursor is not valid for these settings; while
        iterating, RunFailed at a bad document of a streamed source.
        """
        place = self._place(cursor)
        if isinstance(self.training, SequenceStream):
            steps = _failing_run(streamed_steps(self.training.read(place), self.share, self.plan))
        else:
            steps = stored_steps(self.training, self.share, place.sequences, self.plan)
        depth = -(-self.prefetch_batches // self.share.grad_accum)
        return Prefetcher(steps, depth)

    def valid(self, n_sequences: int) -> Iterator[Batch]:
        """Up to ``n_sequences`` held-out sequences, this rank's share of them; equally many batches on every rank."""
        if self.held_out is None:
            return iter(())
        return held_out_batches(self.held_out, n_sequences, self.share)

    @property
    def valid_bytes_per_label(self) -> float | None:
        """UTF-8 bytes of the held-out documents per token that is predicted: bits per byte = loss / ln 2 / this."""
        if not isinstance(self.held_out, StoredSequences):
            return None
        store, held = self.held_out.store, self.held_out.documents
        prefixes = None if store.prefixes is None else store.prefixes[held]
        return predicted_bytes_per_label(store.documents[held], prefixes, self.held_out.prefix_use)

    def describe(self) -> dict[str, Any]:
        """JSON-able facts: documents, tokens, sequences, what was skipped, what is held out. Streamed counts are not known."""
        facts: dict[str, Any] = {"vocab_size": self.vocab_size, "streaming": isinstance(self.training, SequenceStream)}
        if isinstance(self.training, StoredSequences):
            facts |= _facts("train", self.training)
            facts |= {"skipped": self.training.store.skipped, "store": str(self.training.store.folder)}
        if isinstance(self.training, SyntheticSequences):
            facts |= {"synthetic": self.training.name}
        if isinstance(self.held_out, StoredSequences):
            names = self.held_out.store.origins
            facts |= _facts("valid", self.held_out)
            facts |= {"valid_skipped": self.held_out.store.skipped, "valid_bytes_per_label": self.valid_bytes_per_label}
            facts |= {"valid_origins": [names[i] for i in self.held_out.documents[:20]], "copies_left_out": self.copies_left_out}
        return facts

    def _place(self, cursor: Cursor | None) -> Place:
        if cursor is None:
            return Place()
        saved = cursor.get("plan")
        if not isinstance(saved, dict) or saved.keys() != self.plan.keys():
            raise UserError("the saved data position is damaged, or of another version; resume from another checkpoint")
        for setting, now in self.plan.items():
            if saved[setting] != now:
                raise UserError(
                    f"{setting} was {saved[setting]} when the run was saved and is {now}: the data position means nothing then; "
                    "restore it, or start a new run"
                )
        return Place.from_cursor({**Place().to_cursor(), **cursor})


def build_data(
    config: RunConfig,
    dp_rank: int = 0,
    dp_size: int = 1,
    *,
    verify: bool = False,
    progress: Progress | None = None,
) -> Data:
    """The data of one data-parallel rank; sequence-parallel ranks of one group pass the same ``dp_rank``.

    Tokenises the source if no other process did. ``verify`` reads a cached token store against its checksums, ``progress`` is told
    (parts done, parts in all). Raises UserError for unusable settings, paths, tokenizers or documents.
    """
    data = config.data
    _check_settings(data)
    tokenizer = tokenizer_of(data)
    if config.model.vocab_size is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is below the {tokenizer.vocab_size} ids of data.tokenizer {data.tokenizer!r}"
        )
    share = Share(dp_rank, dp_size, config.train.micro_batch_size, config.train.grad_accum)
    if is_synthetic(data.source):
        return _generated(config, tokenizer, share)
    open_store = partial(_open_store, config, verify=verify, progress=progress)
    sequences = partial(
        StoredSequences,
        seq_len=data.seq_len,
        seed=config.train.seed,
        document_mask=data.document_mask,
        pad_id=tokenizer.pad_id,
        prefix_use=_prefix_use(data),
    )
    if data.streaming:
        return _streamed(config, tokenizer, share, open_store, sequences, check=verify)
    return _stored(config, tokenizer, share, open_store, sequences)


def prepare(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Tokenise and check everything once, before any rank starts, and describe it (``Data.describe``).

    Raises UserError for whatever is wrong with the input; a streamed source is checked up to its first sequence.
    """
    return build_data(config, verify=True, progress=progress).describe()


def _generated(config: RunConfig, tokenizer: Tokenizer, share: Share) -> Data:
    """Samples of a task; nothing is read but the background, if one is given."""
    data, seed = config.data, config.train.seed
    make = partial(SyntheticSequences, data, seed, tokenizer.pad_id, per_step=share.per_step)
    training, held_out = make("train", count=ENDLESS), make("valid", count=max(1, config.train.eval_sequences))
    plan = {"data.source": data.source, "data.seq_len": data.seq_len, "train.seed": seed}
    if data.synthetic.curriculum:
        plan["sequences per step (with data.synthetic.curriculum)"] = share.per_step
    plan["the training data (data.synthetic, data.tokenizer)"] = training.fingerprint()
    return Data(tokenizer, share, data.prefetch_batches, training, held_out if config.train.eval_sequences else None, plan)


def _stored(
    config: RunConfig,
    tokenizer: Tokenizer,
    share: Share,
    open_store: Callable[[ValidOrTrain], TokenStore],
    sequences: Callable[..., StoredSequences],
) -> Data:
    """Training and held-out documents from token stores."""
    data = config.data
    store, copies = open_store("data.path"), 0
    if data.valid_path:
        valid_store = open_store("data.valid_path")
        chosen, copies = without_copies(store.documents, valid_store.documents)
        held = np.arange(len(valid_store.documents))
        if len(chosen) == 0:
            raise UserError(f"data.valid_path {data.valid_path} holds every document of data.path; nothing is left to train on")
    else:
        valid_store = store
        chosen, held = split_documents(store.documents, data.valid_fraction)
    lanes = config.global_batch_sequences if config.train.carry_state == "document" else 0
    follow = {"sequences per step (with train.carry_state)": lanes} if lanes else {}
    plan = _plan(data, config.train.seed) | follow | {_CONTENT: _hash(store.content_hash.encode(), chosen.tobytes())}
    held_out = sequences(valid_store, held, shuffle="none") if len(held) else None
    training = sequences(store, chosen, shuffle=data.shuffle, lanes=lanes)
    return Data(tokenizer, share, data.prefetch_batches, training, held_out, plan, copies)


def _streamed(
    config: RunConfig,
    tokenizer: Tokenizer,
    share: Share,
    open_store: Callable[[ValidOrTrain], TokenStore],
    sequences: Callable[..., StoredSequences],
    check: bool,
) -> Data:
    """Training documents as they are read; held-out ones from a token store. ``check`` reads up to the first sequence."""
    data = config.data
    source = _open_source(config, "data.path")
    training = SequenceStream(
        source,
        tokenizer,
        seq_len=data.seq_len,
        document_mask=data.document_mask,
        on_bad_document=data.on_bad_document,
        beside=_beside(config),
        prefix_use=_prefix_use(data),
    )
    if check:
        next(training.read(Place()))
    held_out = None
    if data.valid_path:
        store = open_store("data.valid_path")
        held_out = sequences(store, np.arange(len(store.documents)), shuffle="none")
    # Too large to hash: how the source falls into parts (sizes of files, rows of tables) tells it from another one.
    layout = repr((type(source).__name__, training.units, source.size_bytes(), tokenizer.fingerprint()))
    return Data(tokenizer, share, data.prefetch_batches, training, held_out, _plan(data, None) | {_CONTENT: _hash(layout.encode())})


def _check_settings(data: DataSection) -> None:
    if data.source == "python_stdlib" and data.valid_path:
        raise UserError("data.valid_path: python_stdlib holds out whole packages by data.valid_fraction; set data.valid_path=null")
    wrong = []
    if data.streaming and data.shuffle != "none":
        wrong.append("data.shuffle=none (a stream is read in file order; shuffle the files beforehand)")
    if data.streaming and data.valid_path is None and data.valid_fraction > 0:
        wrong.append("data.valid_path, or data.valid_fraction=0 (choosing held-out documents would need a whole pass over the source)")
    if wrong:
        raise UserError("data.streaming=true needs " + " and ".join(wrong))


def _open_source(config: RunConfig, key: ValidOrTrain) -> Source:
    data = config.data
    train = key == "data.path"
    return open_source(
        cast(SourceKind, data.source),  # generated data have no files
        data.path if train else data.valid_path,
        text_field=data.text_field,
        beside=_beside(config),
        hub_config=data.hub_config,
        hub_split=data.hub_split,
        streaming=data.streaming and train,
        allow_download=data.allow_download,
        key=key,
    )


def _open_store(config: RunConfig, key: ValidOrTrain, verify: bool, progress: Progress | None) -> TokenStore:
    data, source = config.data, _open_source(config, key)
    spec = StoreSpec(source, data.tokenizer, data.on_bad_document, data.cache_dir, data.tokenize_workers, key, _beside(config))
    return open_or_build(spec, verify, progress)


def _beside(config: RunConfig) -> Beside:
    data = config.data
    prefixes = None if data.prefix_key is None else Prefixes(data.prefix_key, data.prefix_unit)
    return Beside(prefixes, None if data.cluster_key is None else Clusters(data.cluster_key, config.model.hierarchical.clusters[-1]))


def _prefix_use(data: DataSection) -> PrefixUse:
    return PrefixUse(mask=data.bidirectional_prefixes, loss=data.prefix_loss) if data.prefix_key is not None else CAUSAL


def _plan(data: DataSection, seed: int | None) -> dict[str, Any]:
    return {"data.seq_len": data.seq_len, "data.streaming": data.streaming, "data.shuffle": data.shuffle, "train.seed": seed}


def _facts(name: str, sequences: StoredSequences) -> dict[str, int]:
    packing = sequences.packing
    return {f"{name}_documents": len(packing.lengths), f"{name}_tokens": packing.n_tokens, f"{name}_sequences": packing.n_sequences}


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _failing_run(steps: Iterator[Step]) -> Iterator[Step]:
    """A source that turns out unusable once training goes on ends the run as failed, not as never started."""
    try:
        yield from steps
    except UserError as error:
        raise RunFailed(str(error)) from error
