"""`sparsecli pack`: a model with its weights in the order of the native engine, made once and not at every start."""

from __future__ import annotations

import shutil
from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.packed.file import save
from sparsecli.decode.packed.folder import pack_folder
from sparsecli.decode.packed.precision import Precision
from sparsecli.model.files import (
    CONFIG,
    PACKED,
    check_weights,
    find_model,
    read_description,
    written_beside,
)
from sparsecli.model.tokenizer import FILES, read_tokenizer


def run(*, model: str | None, output: Path | None, dtype: str, dry_run: bool = False) -> None:
    """The `pack` command: a model folder with packed weights of one type, beside the one it was made from.

    Raises:
        Failure: no model or a damaged one, one with an encoder, or the output is there already or cannot be written.
    """
    source = find_model(model)
    spec = read_description(source).spec
    if spec.encoder:
        raise Failure(
            f"{source}: its encoder runs in PyTorch, from the model's own files; only decoders are packed"
        )
    read_tokenizer(source, spec.vocabulary.size)
    check_weights(source, spec)
    if output is None:
        named = source if source.name else source.absolute()
        output = named.with_name(f"{named.name}-{dtype}")
    if output.exists():
        raise Failure(f"{output}: is there already; choose another --output")
    copied = [name for name in (CONFIG, *FILES) if (source / name).is_file()]
    if dry_run:
        console.print_table(
            ["plan", ""],
            [
                ("model", str(source)),
                ("weights", dtype),
                ("files", f"{', '.join([PACKED, *copied])} in {output}"),
            ],
        )
        return
    packed = pack_folder(source, spec, Precision.of(dtype))
    with written_beside(output) as made:
        for name in copied:
            shutil.copyfile(source / name, made / name)
        save(packed, made / PACKED)
    console.say(
        f"wrote {output} ({packed.nbytes / 1e6:,.1f} MB of weights); sparsecli generate --model {output}"
    )
