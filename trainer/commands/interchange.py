"""The verbs ``import`` and ``export``: models from and to Hugging Face's format."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from models.errors import UserError
from trainer import config_file
from trainer.commands.open_run import reload
from trainer.commands.places import HOME, find_run
from trainer.commands.terminal import tell


def import_model(args: argparse.Namespace) -> int:
    """``longstride import``."""
    path = config_file.find(args.config, HOME / "configs") if args.config else None
    own = [word for word in args.overrides if word.startswith(("model.", "train.init_from="))]
    if own:
        raise UserError(f"command line: {own[0]}: comes from the imported model; change it in the settings of a run that begins from it")
    base = config_file.resolve(path, args.overrides)

    from trainer.interchange.importing import import_model

    target = Path(args.target)
    config = import_model(Path(args.model), target, base, tell)
    settings = shlex.quote(str(target / "config.yaml"))
    print(f"{target}: {len(config.model.layer_kinds)} layers, d_model {config.model.d_model}, vocabulary {config.model.vocab_size}")
    print(f"next:\n  longstride plan {settings}\n  longstride train {settings} data.source=jsonl data.path=DATA.jsonl train.steps=1000")
    return 0


def export_run(args: argparse.Namespace) -> int:
    """``longstride export``."""
    run_dir = find_run(args.name, args.root)

    from trainer.interchange.exporting import export_model

    done = export_model(run_dir, Path(args.target), args.step, args.dtype)
    own = ", trust_remote_code=True" if done.family == "longstride" else ""
    print(f"step {done.step} as {done.family}: {', '.join(file.name for file in done.files if not file.name.startswith('longstride_'))}")
    print(f"load it with: AutoModelForCausalLM.from_pretrained({str(Path(args.target))!r}{own})")
    if reload(run_dir).data.bidirectional_prefixes:
        print("note: the run's attention saw prefixes whole (data.prefix_mask bidirectional); the exported model reads every text causally")
    return 0
